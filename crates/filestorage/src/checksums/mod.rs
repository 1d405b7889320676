//! Checksums of what is durable: of the data file, block by block, and of blobs.

pub(crate) mod blobs;
pub(crate) mod blocks;
