//! The configuration: a `zeo.conf` as ZEO's users have it, plus `<standby>`.

mod schema;
mod zconfig;

pub use schema::{
    Address, Config, DEFAULT_RESERVE, DEFAULT_SCRUB_RATE, EventLog, LogFileSection, MemberLine,
    Profile, Recovery, Secrets, Standby, StorageSection, ZeoAddress, ZeoSection, word,
};
pub use zconfig::ConfigError;
