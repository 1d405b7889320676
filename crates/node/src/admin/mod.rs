//! HTTP for people and for monitoring.

pub mod http;
pub(crate) mod metrics;
pub mod route;
