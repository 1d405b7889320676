//! Room on a disk.

/// What may still be written to a disk.
#[derive(Clone, Copy, Debug)]
pub struct FreeRoom {
    /// Bytes.
    pub bytes: u64,
    /// Files (inodes).
    pub files: u64,
}
