//! A client's bytes, from the first one on: frames, the handshake, calls in both encodings. The
//! session is told of a successful `register`, and that its votes succeed.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use standby_types::Disk;
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;
use standby_zeo::{Effect, FrameReader, Limits, Options, Session, VoteAnswer, VoteOutcome};

fuzz_target!(|data: &[u8]| {
    let disk = MemoryDisk::new();
    let options = Options {
        msgpack: false,
        read_only: false,
        read_only_storages: Arc::new([]),
        make_spill: Arc::new(move || disk.open(Path::new("/spill"), Open::Create)),
        limits: Limits::default(),
    };
    let mut session = Session::new(options);
    let mut frames = FrameReader::default();
    let mut effects = Vec::new();
    for chunk in data.chunks(97) {
        frames.buffer().extend_from_slice(chunk);
        while let Ok(Some(frame)) = frames.next_frame(session.frame_limit()) {
            session.receive(frame, &mut effects);
            for effect in effects.drain(..) {
                match effect {
                    Effect::Close(_) => return,
                    Effect::Register { .. } => session.registered(true),
                    Effect::Vote(_) => {
                        session.take_deferred().unwrap_or_default();
                        let _: Option<Bytes> =
                            session.voted(VoteOutcome::Answer(VoteAnswer::Voted));
                    }
                    Effect::Finish { transaction, .. } => {
                        for write in transaction.writes() {
                            transaction.content(write).expect("what was kept can be read");
                        }
                    }
                    _ => {}
                }
            }
        }
    }
});
