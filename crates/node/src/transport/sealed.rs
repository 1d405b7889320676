//! Encryption between nodes that share a secret and have no certificates.
//!
//! A connection begins with TLS 1.3. The accepting side shows a key that it has drawn for this
//! process, and nobody looks at it: who is there is proved by the handshake inside, whose proofs
//! cover a value that only the two ends of this very TLS connection know (its exporter, RFC 8446,
//! section 7.5). Whoever sits between two nodes has two TLS connections with two such values; what
//! each node proves over one of them proves nothing over the other.

use std::sync::Arc;

use anyhow::Context;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    WebPkiSupportedAlgorithms, ring as provider, verify_tls13_signature_with_raw_key,
};
use tokio_rustls::rustls::pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use tokio_rustls::rustls::server::AlwaysResolvesServerRawPublicKeys;
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, PeerMisbehaved, ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::platform::TcpStream;

/// Names what is exported from a TLS connection.
const LABEL: &[u8] = b"EXPORTER-standby-peers";
/// Bytes of it.
const BOUND: usize = 32;

/// What ties proofs to one connection: only its two ends know it.
pub(crate) type Bound = [u8; BOUND];

/// See the module.
pub(crate) struct Sealed {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl Sealed {
    /// Draws the key.
    pub(crate) fn new() -> anyhow::Result<Sealed> {
        let provider = Arc::new(provider::default_provider());
        let drawn =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new());
        let drawn = drawn.ok().context("cannot draw a key for connections between nodes")?;
        let key = PrivateKeyDer::Pkcs8(drawn.as_ref().to_vec().into());
        let key = provider.key_provider.load_private_key(key)?;
        let public =
            key.public_key().context("the key for connections between nodes has no public part")?;
        let public = CertificateDer::from(public.to_vec());
        let shown = Arc::new(CertifiedKey::new(vec![public], key));
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(shown)));
        let any = AnyKey(provider.signature_verification_algorithms);
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(any))
            .with_no_client_auth();
        Ok(Sealed { acceptor: Arc::new(server).into(), connector: Arc::new(client).into() })
    }

    /// Begins with a node that was dialled.
    pub(crate) async fn connect(
        &self,
        tcp: TcpStream,
    ) -> std::io::Result<(TlsStream<TcpStream>, Bound)> {
        let any_name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let stream = self.connector.connect(any_name, tcp).await?;
        let bound = stream.get_ref().1.export_keying_material([0; BOUND], LABEL, None);
        Ok((stream.into(), bound.map_err(std::io::Error::other)?))
    }

    /// Begins with a node that has dialled.
    pub(crate) async fn accept(
        &self,
        tcp: TcpStream,
    ) -> std::io::Result<(TlsStream<TcpStream>, Bound)> {
        let stream = self.acceptor.accept(tcp).await?;
        let bound = stream.get_ref().1.export_keying_material([0; BOUND], LABEL, None);
        Ok((stream.into(), bound.map_err(std::io::Error::other)?))
    }
}

/// Takes any key, whose owner signs with it.
#[derive(Debug)]
struct AnyKey(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
