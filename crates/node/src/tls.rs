//! TLS for clients: the `<ssl>` section of zeo.conf.
//!
//! As with the Python server, a client must always show a certificate. It is let in if the
//! certificate is one of those in `authenticate`, or was issued by one of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use anyhow::{Context, bail};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
};

/// `<ssl>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SslSection {
    /// The server's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key; the same file by default.
    pub key: PathBuf,
    /// A file with certificates, or a folder of such files.
    pub authenticate: PathBuf,
}

/// What new connections use; can be read again from the files.
pub struct Tls {
    section: SslSection,
    acceptor: RwLock<TlsAcceptor>,
}

impl Tls {
    /// Reads the files.
    pub fn new(section: &SslSection) -> anyhow::Result<Tls> {
        let acceptor = RwLock::new(load(section)?);
        Ok(Tls { section: section.clone(), acceptor })
    }

    /// Reads the files again; after an error the old certificates stay in use.
    pub fn reload(&self) -> anyhow::Result<()> {
        let acceptor = load(&self.section)?;
        *self.acceptor.write().unwrap_or_else(std::sync::PoisonError::into_inner) = acceptor;
        Ok(())
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

fn load(section: &SslSection) -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(&section.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&section.key).with_context(|| {
        format!(
            "{}: cannot read a private key; one that is encrypted must be decrypted first \
             (openssl pkey -in FILE -out FILE)",
            section.key.display()
        )
    })?;
    let trusted = trusted(&section.authenticate)?;
    let verifier = Verifier::new(&provider, trusted).with_context(|| {
        format!("{}: no certificate can be used", section.authenticate.display())
    })?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .with_context(|| format!("{} and its key do not fit", section.certificate.display()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let cannot = || format!("{}: cannot read certificates", path.display());
    let found = CertificateDer::pem_file_iter(path)
        .with_context(cannot)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(cannot)?;
    if found.is_empty() {
        bail!("{}: there is no certificate in it", path.display());
    }
    Ok(found)
}

fn trusted(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    if !path.is_dir() {
        return certificates(path);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
        let file = entry?.path();
        if file.is_file() {
            found.extend(certificates(&file)?);
        }
    }
    if found.is_empty() {
        bail!("{}: there is no file with a certificate in it", path.display());
    }
    Ok(found)
}

/// Knows the trusted certificates themselves, and what they have issued.
#[derive(Debug)]
struct Verifier {
    known: Vec<CertificateDer<'static>>,
    issued: Arc<dyn ClientCertVerifier>,
}

impl Verifier {
    fn new(
        provider: &Arc<CryptoProvider>,
        known: Vec<CertificateDer<'static>>,
    ) -> anyhow::Result<Verifier> {
        let mut roots = RootCertStore::empty();
        for certificate in &known {
            roots.add(certificate.clone())?;
        }
        let issued =
            WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
        Ok(Verifier { known, issued })
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.issued.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        // One that is known need not be issued by anybody: it may be self-signed.
        if self.known.iter().any(|known| known == end_entity) {
            return Ok(ClientCertVerified::assertion());
        }
        self.issued.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.issued.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.issued.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.issued.supported_verify_schemes()
    }
}
