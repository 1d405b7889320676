//! HTTP for people and for monitoring.

#[cfg(not(feature = "simulated"))]
pub(crate) mod http;
#[cfg(not(feature = "simulated"))]
pub(crate) mod metrics;
pub(crate) mod route;
