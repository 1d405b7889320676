//! Transcripts: what the machine does, as text that people read.
//!
//! Each file of `testdata/` is one scenario. Lines that begin with `#` say what it is about, lines
//! that begin with `>` are commands ([`script`] lists them), and the lines between them are what
//! followed. After a change, `TRANSCRIPTS=write cargo test -p standby-primary --test transcripts`
//! writes the files again; the difference is for a person to judge.

mod facts;
mod script;
mod world;

use std::fs;
use std::path::{Path, PathBuf};

use script::replay;

fn files() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn transcripts() {
    let write = std::env::var_os("TRANSCRIPTS").is_some_and(|value| value == "write");
    let mut different = Vec::new();
    for file in files() {
        let text = fs::read_to_string(&file).unwrap();
        let now = replay(&text);
        if now != text {
            if write {
                fs::write(&file, &now).unwrap();
            }
            let mut pairs = text.lines().zip(now.lines()).enumerate();
            let first = pairs.find(|(_, (before, now))| before != now);
            different.push(format!("{}: {first:?}", file.display()));
        }
    }
    assert!(write || different.is_empty(), "other than written: {different:#?}");
}

#[test]
fn there_are_transcripts_of_each_kind_of_decision() {
    let names: Vec<_> = files()
        .iter()
        .map(|file| file.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(names.len() >= 30, "{} transcripts", names.len());
    let kinds = [
        "commit",
        "conflict",
        "switchover",
        "membership",
        "promotion",
        "candidacy",
        "disk",
        "read_index",
        "blob",
        "oids",
        "outcome",
        "pack",
    ];
    for kind in kinds {
        assert!(names.iter().any(|name| name.starts_with(kind)), "none of {kind}");
    }
}
