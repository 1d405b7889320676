//! What TLS must know of a certificate that is trusted by name, beside its bytes.

use std::time::Duration;

use anyhow::Context;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::{CertificateError, Error};
use x509_cert::der::Decode;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage};
use x509_cert::{Certificate, Version};

/// A certificate whose time and purpose were read.
#[derive(Debug)]
pub(crate) struct Known {
    /// As it is sent.
    pub der: CertificateDer<'static>,
    /// It may issue others.
    pub is_authority: bool,
    /// Whom it names.
    pub subject: String,
    /// Since 1970, both included.
    valid: (Duration, Duration),
}

impl Known {
    /// Reads a certificate.
    pub(crate) fn read(der: CertificateDer<'static>) -> anyhow::Result<Known> {
        let read = Certificate::from_der(&der).context("it is not a certificate of X.509")?;
        let content = &read.tbs_certificate;
        let basic = content.get::<BasicConstraints>().context("its basicConstraints")?;
        let usage = content.get::<KeyUsage>().context("its keyUsage")?;
        let may_sign = usage.is_none_or(|(_, usage)| usage.key_cert_sign());
        let is_authority = match basic {
            Some((_, basic)) => basic.ca && may_sign,
            // As for OpenSSL: before version 3 a certificate could not say so.
            None => content.version == Version::V1 && content.issuer == content.subject,
        };
        let valid = &content.validity;
        let valid = (valid.not_before.to_unix_duration(), valid.not_after.to_unix_duration());
        let subject = content.subject.to_string();
        Ok(Known { der, is_authority, subject, valid })
    }

    /// An error if the certificate is not valid yet, or not any more.
    pub(crate) fn check(&self, now: UnixTime) -> Result<(), Error> {
        let now = Duration::from_secs(now.as_secs());
        if now < self.valid.0 {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > self.valid.1 {
            return Err(CertificateError::Expired.into());
        }
        Ok(())
    }

    /// For how long it is valid from then on; nothing if it is not any more.
    pub(crate) fn left(&self, now: UnixTime) -> Duration {
        self.valid.1.saturating_sub(Duration::from_secs(now.as_secs()))
    }
}
