//! TLS: the `<ssl>` section of zeo.conf for clients, and `<peer-ssl>` for the other nodes.
//!
//! As with the Python server, a client must always show a certificate. It is let in if the
//! certificate is one of those in `authenticate`, or was issued by one of them that is an
//! authority; and in both cases only while it is valid. Nodes show certificates to each other and
//! look at them in the same way, whichever has dialled; the names in them do not matter.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use anyhow::{Context, bail};
use pkcs8::{EncryptedPrivateKeyInfo, SecretDocument};
use standby_config::SslSection;
use standby_types::lock::lock;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tracing::warn;

use crate::platform::{self, TcpStream};
use crate::transport::certificate::Known;

/// What new connections use; can be read again from the files.
pub struct Tls {
    section: SslSection,
    current: RwLock<Current>,
    /// What was told last of the end of each certificate, by its file and subject.
    told: Mutex<BTreeMap<(PathBuf, String), u64>>,
}

struct Current {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    /// What this side shows.
    own: Vec<Known>,
    /// What it trusts.
    verifier: Arc<Verifier>,
}

impl Tls {
    /// Reads the files.
    pub fn new(section: &SslSection) -> anyhow::Result<Tls> {
        let current = RwLock::new(load(section)?);
        let tls = Tls { section: section.clone(), current, told: Mutex::default() };
        tls.warn_of_ends();
        Ok(tls)
    }

    /// Reads the files again; after an error the old certificates stay in use.
    pub(crate) fn reload(&self) -> anyhow::Result<()> {
        let read = load(&self.section)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = read;
        lock(&self.told).clear();
        self.warn_of_ends();
        Ok(())
    }

    fn current(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the next connection.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.current().acceptor.clone()
    }

    /// Those that this side shows, and those that it trusts, with their files.
    fn each(&self, mut look: impl FnMut(&Path, &Known)) {
        let current = self.current();
        current.own.iter().for_each(|known| look(&self.section.certificate, known));
        current.verifier.known.iter().for_each(|known| look(&self.section.authenticate, known));
    }

    /// The file, the subject, and the time that is left of each certificate.
    pub(crate) fn ends(&self) -> Vec<(PathBuf, String, Duration)> {
        let (now, mut ends) = (now(), Vec::new());
        self.each(|file, known| {
            ends.push((file.to_owned(), known.subject.clone(), known.left(now)));
        });
        ends
    }

    /// Tells of certificates whose time is over, or will be soon, as often as the next of [`SOON`]
    /// comes: nobody is let in with them then.
    pub(crate) fn warn_of_ends(&self) {
        let (now, mut told) = (now(), lock(&self.told));
        self.each(|file, known| {
            let (left, subject) = (known.left(now), &known.subject);
            let wrong = known.check(now).err();
            let Some(step) = wrong.as_ref().map_or_else(|| step(left), |_| Some(0)) else { return };
            if told.insert((file.to_owned(), subject.clone()), step) == Some(step) {
                return;
            }
            let (file, days) = (file.display(), left.as_secs() / DAY);
            match wrong {
                Some(error) => warn!(%file, subject, %error, "a certificate is of no use"),
                None => warn!(%file, subject, days, "a certificate is valid for so many days only"),
            }
        });
    }

    /// Begins TLS with a node that was dialled.
    pub async fn connect(
        &self,
        tcp: TcpStream,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let connector = self.current().connector.clone();
        let any_name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        connector.connect(any_name, tcp).await
    }
}

fn load(section: &SslSection) -> anyhow::Result<Current> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(&section.certificate)?;
    let key = private_key(section)?;
    let trusted = trusted(&section.authenticate)?;
    let verifier = Verifier::new(&provider, trusted).with_context(|| {
        format!("{}: no certificate can be used", section.authenticate.display())
    })?;
    let own = chain.iter().take(1).cloned().map(Known::read).collect::<anyhow::Result<Vec<_>>>();
    let own = own.with_context(|| section.certificate.display().to_string())?;
    let verifier = Arc::new(verifier);
    let do_not_fit = || format!("{} and its key do not fit", section.certificate.display());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(chain.clone(), key.clone_key())
        .with_context(do_not_fit)?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(chain, key)
        .with_context(do_not_fit)?;
    let (acceptor, connector) = (Arc::new(server).into(), Arc::new(client).into());
    Ok(Current { acceptor, connector, own, verifier })
}

const DAY: u64 = 86_400;
/// Days before its end at which a certificate is told of.
const SOON: [u64; 3] = [1, 7, 30];

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(platform::wall_clock())
}

/// The one of [`SOON`] that has come last; `None` before the first.
fn step(left: Duration) -> Option<u64> {
    SOON.into_iter().find(|days| left <= Duration::from_secs(days * DAY))
}

const ENCRYPTED: [&str; 2] =
    ["-----BEGIN ENCRYPTED PRIVATE KEY-----", "-----END ENCRYPTED PRIVATE KEY-----"];

fn private_key(section: &SslSection) -> anyhow::Result<PrivateKeyDer<'static>> {
    let file = section.key.display();
    let cannot = || format!("{file}: cannot read a private key");
    let text = fs::read_to_string(&section.key).with_context(cannot)?;
    let [begin, end] = ENCRYPTED.map(|line| text.find(line));
    let Some((begin, end)) = begin.zip(end).filter(|(begin, end)| begin < end) else {
        if text.contains("Proc-Type: 4,ENCRYPTED") {
            bail!(
                "{file}: the key is encrypted in an old way; convert it with \
                 openssl pkey -aes256 -in FILE -out FILE"
            );
        }
        return PrivateKeyDer::from_pem_slice(text.as_bytes()).with_context(cannot);
    };
    let Some(function) = &section.password_function else {
        bail!("{file}: the key is encrypted, but there is no \"password-function\"");
    };
    let password = password(function)?;
    let pem = &text[begin..end + ENCRYPTED[1].len()];
    // The libraries' errors do not show what they were given.
    let opened =
        SecretDocument::from_pem(pem).map_err(|error| anyhow::anyhow!("{file}: {error}"))?;
    let key = EncryptedPrivateKeyInfo::try_from(opened.1.as_bytes())
        .and_then(|key| key.decrypt(password))
        .map_err(|error| {
            anyhow::anyhow!("{file}: cannot decrypt the key: {error}; is the password right?")
        })?;
    Ok(PrivateKeyDer::Pkcs8(key.as_bytes().to_vec().into()))
}

/// Calls a function of Python, in a process of its own: `python3`, or what STANDBY_PYTHON names.
fn password(function: &str) -> anyhow::Result<Vec<u8>> {
    const CALL: &str = "import importlib, sys\n\
        module, name = sys.argv[1].rsplit('.', 1)\n\
        password = getattr(importlib.import_module(module), name)()\n\
        password = password.encode() if isinstance(password, str) else bytes(password)\n\
        sys.stdout.buffer.write(password)\n";
    let python = std::env::var("STANDBY_PYTHON").unwrap_or_else(|_| "python3".into());
    let called = Command::new(&python)
        .args(["-c", CALL, function])
        .output()
        .with_context(|| format!("password-function {function}: cannot run {python}"))?;
    if !called.status.success() {
        let said = String::from_utf8_lossy(&called.stderr);
        let last = said.trim().lines().next_back().unwrap_or("it says nothing").to_owned();
        bail!(
            "password-function {function}: {python} cannot call it ({last}). Set STANDBY_PYTHON to \
             the Python that can, or PYTHONPATH"
        );
    }
    Ok(called.stdout)
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

/// Knows the trusted certificates themselves, and what the authorities among them have issued.
#[derive(Debug)]
struct Verifier {
    known: Vec<Known>,
    /// `None` if there is no authority.
    issued: Option<Arc<dyn ClientCertVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(
        provider: &Arc<CryptoProvider>,
        trusted: Vec<CertificateDer<'static>>,
    ) -> anyhow::Result<Verifier> {
        let known = trusted.into_iter().map(Known::read).collect::<anyhow::Result<Vec<_>>>()?;
        let now = now();
        let issues = |known: &&Known| known.is_authority && !known.left(now).is_zero();
        let mut roots = RootCertStore::empty();
        for authority in known.iter().filter(issues) {
            roots.add(authority.der.clone())?;
        }
        let issued = match roots.is_empty() {
            true => None,
            false => Some(
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                    .build()?,
            ),
        };
        Ok(Verifier { known, issued, algorithms: provider.signature_verification_algorithms })
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.issued.as_ref().map_or(&[], |issued| issued.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        // One that is known need not be issued by anybody: it may be self-signed.
        if let Some(known) = self.known.iter().find(|known| known.der == *end_entity) {
            known.check(now)?;
            return Ok(ClientCertVerified::assertion());
        }
        match &self.issued {
            Some(issued) => issued.verify_client_cert(end_entity, intermediates, now),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// For a node that was dialled: it is looked at as one that dials.
impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify_client_cert(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_40_a_certificate_is_told_of_as_its_end_comes() {
        let days = |days: f64| step(Duration::from_secs_f64(days * DAY as f64));
        assert_eq!(days(365.0), None);
        assert_eq!(days(30.1), None);
        let told = [29.9, 8.0, 6.9, 1.1, 0.9].map(days);
        assert_eq!(told, [Some(30), Some(30), Some(7), Some(7), Some(1)]);
    }
}
