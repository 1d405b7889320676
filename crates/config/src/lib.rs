//! The configuration: a `zeo.conf` as ZEO's users have it, plus `<standby>`.

mod address;
mod reader;
mod schema;
mod ssl;
mod standby;
mod zconfig;

pub use address::{Address, ZeoAddress};
pub use reader::word;
pub use schema::{Config, StorageSection, ZeoSection};
pub use ssl::SslSection;
pub use standby::{
    DEFAULT_RESERVE, DEFAULT_SCRUB_RATE, MemberLine, Profile, Recovery, Secrets, Standby,
};
pub use zconfig::ConfigError;
