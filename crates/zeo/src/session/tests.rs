use std::io;
use std::sync::Arc;

use super::*;
use crate::message::Reply;

const OID: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 1];
const TID: [u8; 8] = [3, 0, 0, 0, 0, 0, 0, 1];

struct Client {
    session: Session,
    encoding: Encoding,
}

impl Client {
    fn connect(encoding: Encoding, read_only_listener: bool) -> Client {
        let options = Options {
            msgpack: false,
            read_only: read_only_listener,
            read_only_storages: Arc::from(["frozen".to_owned()]),
            make_spill: Arc::new(|| Err(io::ErrorKind::Unsupported.into())),
            limits: Limits { objects: 5, bytes: 1000 },
        };
        let mut client = Client { session: Session::new(options), encoding };
        assert!(client.frame(Bytes::from_static(encoding.version())).is_empty());
        client
    }

    fn registered(encoding: Encoding) -> Client {
        let mut client = Client::connect(encoding, false);
        let effects = client.call("register", vec![Value::str("1"), false.into()]);
        let [Effect::Register { storage, read_only, .. }] = &effects[..] else {
            panic!("{effects:?}")
        };
        assert_eq!((storage.as_str(), *read_only), ("1", false));
        client.session.registered(true);
        client
    }

    fn frame(&mut self, frame: Bytes) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.session.receive(frame, &mut effects);
        effects
    }

    fn call(&mut self, method: &str, args: Vec<Value>) -> Vec<Effect> {
        let frame = self.encoding.call(&Value::Int(1), method, args).slice(4..);
        self.frame(frame)
    }

    fn notify(&mut self, method: &str, args: Vec<Value>) -> Vec<Effect> {
        let frame = self.encoding.notify(method, args).slice(4..);
        self.frame(frame)
    }

    fn result(&self, frame: &Bytes) -> Result<Value, (String, Value)> {
        match self.encoding.decode(&frame.slice(4..)) {
            Ok(Incoming::Reply(Reply { result, .. })) => result,
            other => panic!("{other:?}"),
        }
    }

    fn replied(&mut self, method: &str, args: Vec<Value>) -> Result<Value, (String, Value)> {
        let effects = self.call(method, args);
        let [Effect::Send(frame)] = &effects[..] else { panic!("{effects:?}") };
        self.result(frame)
    }

    fn begin_and_store(&mut self, name: i64) {
        let text = Value::bytes(b"");
        let begin = vec![
            name.into(),
            text.clone(),
            text,
            Value::Dict(vec![]),
            Value::None,
            Value::str(" "),
        ];
        assert!(self.notify("tpc_begin", begin).is_empty());
        self.store(name, TID, b"data");
    }

    fn store(&mut self, name: i64, serial: [u8; 8], data: &[u8]) {
        let store = vec![OID.into(), serial.into(), Value::bytes(data), name.into()];
        assert!(self.notify("storea", store).is_empty());
    }
}

fn closed(effects: &[Effect]) -> &CloseReason {
    match effects {
        [Effect::Close(reason)] => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_asks_for_an_answer_gets_one() {
    let mut client = Client::registered(Encoding::Pickle);
    let text = || Value::bytes(b"");
    let begin =
        vec![Value::Int(7), text(), text(), Value::Dict(vec![]), Value::None, Value::str(" ")];
    assert_eq!(client.replied("tpc_begin", begin), Ok(Value::None));
    let stored = vec![Value::bytes(&OID), Value::bytes(&TID), Value::bytes(b"data"), Value::Int(7)];
    assert_eq!(client.replied("storea", stored), Ok(Value::None));
    let checked = vec![Value::bytes(&OID), Value::bytes(&TID), Value::Int(7)];
    assert_eq!(client.replied("checkCurrentSerialInTransaction", checked), Ok(Value::None));
}

#[test]
fn what_is_not_to_be_answered_is_not_answered() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let mut client = Client::registered(encoding);
        let (oid, tid) = (Value::bytes(&OID), Value::bytes(&TID));
        for (method, args) in [
            ("loadBefore", vec![oid.clone(), tid.clone()]),
            ("loadSerial", vec![oid.clone(), tid.clone()]),
            ("getTid", vec![oid]),
            ("lastTransaction", vec![]),
            ("server_status", vec![]),
            ("ping", vec![]),
            ("getInvalidations", vec![tid]),
            ("new_oids", vec![Value::Int(1)]),
            ("tpc_abort", vec![Value::Int(7)]),
        ] {
            let effects = client.notify(method, args.clone());
            assert!(effects.is_empty(), "{method}: {effects:?}");
            assert_eq!(client.call(method, args).len(), 1, "{method}");
        }
        // What it does besides is done.
        client.begin_and_store(7);
        assert!(matches!(client.notify("tpc_abort", vec![Value::Int(7)])[..], [Effect::Abort]));
    }
}

#[test]
fn commit_in_both_encodings() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let mut client = Client::registered(encoding);
        client.begin_and_store(99);
        let effects = client.call("vote", vec![99.into()]);
        let [Effect::Vote(request)] = &effects[..] else { panic!("{effects:?}") };
        let based_on = Expected::Serial(Tid::from_slice(&TID).unwrap());
        assert_eq!(request.writes, [(Oid(1), based_on)]);
        let reply = client.session.voted(VoteOutcome::Answer(VoteAnswer::Voted)).unwrap();
        assert_eq!(client.result(&reply).unwrap().items(), Some(&[][..]));
        let effects = client.call("tpc_finish", vec![99.into()]);
        let [Effect::Finish { transaction, .. }] = &effects[..] else { panic!("{effects:?}") };
        let content = transaction.content(&transaction.writes()[0]).unwrap();
        assert_eq!(content, Content::Data(Bytes::from_static(b"data")));
        assert_eq!(client.replied("tpc_abort", vec![99.into()]), Ok(Value::None));
    }
}

#[test]
fn a_conflict_is_answered_with_what_resolution_needs() {
    let mut client = Client::registered(Encoding::Pickle);
    client.begin_and_store(99);
    client.call("vote", vec![99.into()]);
    let conflicts = VoteAnswer::Conflicts(vec![(Oid(1), Tid(8))]);
    let reply = client.session.voted(VoteOutcome::Answer(conflicts)).unwrap();
    let expected = Value::List(vec![Value::Dict(vec![
        (Value::str("oid"), OID.into()),
        (Value::str("serials"), Value::Tuple(vec![Tid(8).to_bytes().into(), TID.into()])),
        (Value::str("data"), Value::bytes(b"data")),
    ])]);
    assert_eq!(client.result(&reply), Ok(expected));
    client.store(99, Tid(8).to_bytes(), b"resolved");
    let effects = client.call("vote", vec![99.into()]);
    let [Effect::Vote(request)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(request.writes, [(Oid(1), Expected::Serial(Tid(8)))]);
}

#[test]
fn calls_that_do_not_fit_the_transaction() {
    let mut client = Client::registered(Encoding::Pickle);
    let (class, args) = client.replied("vote", vec![5.into()]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.StorageTransactionError");
    assert_eq!(args, Value::Tuple(vec![Value::None, 5.into()]));
    assert_eq!(client.replied("tpc_finish", vec![5.into()]), Ok(Value::None));
    client.begin_and_store(1);
    let (class, _) = client.replied("tpc_finish", vec![1.into()]).unwrap_err();
    assert_eq!(class, "builtins.AssertionError");
    let (_, args) = client.replied("vote", vec![2.into()]).unwrap_err();
    assert_eq!(args, Value::Tuple(vec![1.into(), 2.into()]));
    let effects =
        client.notify("storea", vec![OID.into(), TID.into(), Value::bytes(b""), 2.into()]);
    assert!(matches!(closed(&effects), CloseReason::OneWay { .. }));
}

#[test]
fn a_failed_vote_forgets_the_transaction() {
    let mut client = Client::registered(Encoding::Pickle);
    client.begin_and_store(1);
    client.call("vote", vec![1.into()]);
    let conflict =
        VoteAnswer::Refused(ClientError::ReadConflict { oid: Oid(1), serials: (Tid(9), Tid(8)) });
    let reply = client.session.voted(VoteOutcome::Answer(conflict)).unwrap();
    assert_eq!(client.result(&reply).unwrap_err().0, "ZODB.POSException.ReadConflictError");
    let (_, args) = client.replied("vote", vec![1.into()]).unwrap_err();
    assert_eq!(args, Value::Tuple(vec![Value::None, 1.into()]));
}

#[test]
fn undo_is_worked_out_when_the_locks_are_held() {
    let mut client = Client::registered(Encoding::Pickle);
    let text = Value::bytes(b"");
    client.notify("tpc_begin", vec![1.into(), text.clone(), text, Value::Dict(vec![])]);
    // base64 of the tid, without the line feed that Python's encoder adds
    let id = Value::bytes(b"AwAAAAAAAAE=");
    assert!(client.notify("undoa", vec![id, 1.into()]).is_empty());
    let effects = client.call("vote", vec![1.into()]);
    let [Effect::Vote(request)] = &effects[..] else { panic!("{effects:?}") };
    let tid = Tid::from_slice(&TID).unwrap();
    assert_eq!((&request.undos[..], &request.writes[..]), (&[tid][..], &[][..]));
    assert_eq!(client.session.take_deferred().unwrap(), [DeferredWrite::Undo(tid)]);
    let content = Content::Back(Tid(7), None);
    let out = ResolvedWrite { oid: Oid(1), content, undone: true, blob: None };
    client.session.resolved(out).unwrap();
    let reply = client.session.voted(VoteOutcome::Answer(VoteAnswer::Voted)).unwrap();
    assert_eq!(client.result(&reply), Ok(Value::List(vec![OID.into()])));
    let effects = client.call("tpc_finish", vec![1.into()]);
    let [Effect::Finish { transaction, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(transaction.writes().len(), 1);

    let text = Value::bytes(b"");
    client.notify("tpc_begin", vec![2.into(), text.clone(), text, Value::Dict(vec![])]);
    assert!(client.notify("undoa", vec![Value::bytes(b"nonsense"), 2.into()]).is_empty());
    let (class, _) = client.replied("vote", vec![2.into()]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.UndoError");
}

#[test]
fn copies_keep_their_tid_and_status() {
    let mut client = Client::registered(Encoding::Msgpack);
    let text = Value::bytes(b"");
    let begin =
        vec![1.into(), text.clone(), text, Value::Dict(vec![]), TID.into(), Value::str("p")];
    assert!(client.notify("tpc_begin", begin).is_empty());
    for (oid, data, hint) in [
        (1, Value::bytes(b"data"), Value::None),
        (2, Value::None, Value::None),
        (3, Value::bytes(b"data"), TID.into()),
        (4, Value::None, Value::None),
    ] {
        let oid = Oid(oid).to_bytes().into();
        let restore = vec![oid, TID.into(), data, hint, 1.into()];
        assert!(client.notify("restorea", restore).is_empty());
    }
    let effects = client.call("vote", vec![1.into()]);
    let [Effect::Vote(request)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(request.tid, Tid::from_slice(&TID));
    assert!(request.writes.iter().copied().eq((1..5).map(|n| (Oid(n), Expected::Any))));
    // What follows a revision with a hint waits with it: records stay in order.
    assert!(matches!(
        client.session.take_deferred().unwrap()[..],
        [
            DeferredWrite::Restore(Oid(3), Some(_), Some(_)),
            DeferredWrite::Restore(Oid(4), None, None)
        ]
    ));
    client.session.voted(VoteOutcome::Answer(VoteAnswer::Voted)).unwrap();
    let effects = client.call("tpc_finish", vec![1.into()]);
    let [Effect::Finish { transaction, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(transaction.meta.status, b'p');
}

#[test]
fn an_extension_may_be_written_as_a_call() {
    let mut client = Client::registered(Encoding::Pickle);
    let text = Value::bytes(b"");
    let dict = Value::Global { module: "builtins".into(), name: "dict".into() };
    let pair = Value::Tuple(vec![Value::str("foo"), 1.into()]);
    let call = standby_pickle::Object {
        callable: dict,
        args: Value::Tuple(vec![Value::Tuple(vec![pair])]),
        by_new: false,
        state: None,
    };
    let extension = Value::Object(Box::new(call));
    assert!(client.notify("tpc_begin", vec![1.into(), text.clone(), text, extension]).is_empty());
    client.call("vote", vec![1.into()]);
    client.session.voted(VoteOutcome::Answer(VoteAnswer::Voted)).unwrap();
    let effects = client.call("tpc_finish", vec![1.into()]);
    let [Effect::Finish { transaction, .. }] = &effects[..] else { panic!("{effects:?}") };
    let items = vec![(Value::str("foo"), 1.into())];
    assert_eq!(crate::decode_extension(&transaction.meta.extension), Some(Value::Dict(items)));
}

#[test]
fn looks_back() {
    let mut client = Client::registered(Encoding::Pickle);
    for (method, args, expected) in [
        ("history", vec![OID.into(), 3.into()], HistoryCall::History(Oid(1), 3)),
        ("undoLog", vec![0.into(), (-20).into()], HistoryCall::UndoLog(0..20, vec![])),
        ("undoLog", vec![5.into(), (-20).into()], HistoryCall::UndoLog(5..25, vec![])),
        ("undoInfo", vec![2.into(), 4.into(), Value::None], HistoryCall::UndoLog(2..4, vec![])),
        ("iterator_start", vec![Value::None, TID.into()], {
            HistoryCall::IteratorStart(None, Tid::from_slice(&TID))
        }),
        ("record_iternext", vec![Value::None], HistoryCall::RecordIternext(None)),
    ] {
        let effects = client.call(method, args);
        let [Effect::HistoryCall { id: Some(_), asked }] = &effects[..] else {
            panic!("{effects:?}")
        };
        assert_eq!(*asked, expected);
    }
    let effects = client.notify("iterator_gc", vec![Value::List(vec![1.into()])]);
    assert!(matches!(&effects[..], [Effect::HistoryCall { id: None, .. }]));
    let (class, _) = client.replied("history", vec![]).unwrap_err();
    assert_eq!(class, "builtins.TypeError");
    let (class, _) = client.replied("history", vec![Value::None, Value::None]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.POSKeyError");
}

#[test]
fn read_only_sessions() {
    let mut client = Client::connect(Encoding::Pickle, true);
    let (class, _) = client.replied("register", vec![Value::str("1"), false.into()]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.ReadOnlyError");
    let effects = client.call("register", vec![Value::str("1"), true.into()]);
    assert!(matches!(effects[..], [Effect::Register { read_only: true, .. }]));
    client.session.registered(true);
    assert!(client.session.settled_for_read_only());
    assert!(!client.session.is_read_write());
    let (class, _) = client.replied("new_oids", vec![]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.ReadOnlyError");
}

#[test]
fn read_only_storages() {
    let mut client = Client::connect(Encoding::Pickle, false);
    let frozen = Value::str("frozen");
    let (class, _) = client.replied("register", vec![frozen.clone(), false.into()]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.ReadOnlyError");
    let effects = client.call("register", vec![frozen, true.into()]);
    assert!(matches!(effects[..], [Effect::Register { read_only: true, .. }]));
}

#[test]
fn strangers_are_closed() {
    let stranger = |frame: &'static [u8]| {
        let mut client = Client::connect(Encoding::Pickle, false);
        client.session.state = State::AwaitingVersion;
        client.frame(Bytes::from_static(frame))
    };
    for version in [&b"Z4"[..], b"Z3101", b"X5", b"", b"GET / HTTP/1.1"] {
        assert!(matches!(closed(&stranger(version)), CloseReason::Version(_)));
    }
    assert!(matches!(stranger(b"ruok")[..], [Effect::Ruok]));

    let mut client = Client::connect(Encoding::Pickle, false);
    let reason = client.call("lastTransaction", vec![]);
    assert_eq!(*closed(&reason), CloseReason::NotRegistered("lastTransaction".into()));
    let mut client = Client::registered(Encoding::Pickle);
    let reason = client.call("__class__", vec![]);
    assert_eq!(*closed(&reason), CloseReason::UnknownMethod("__class__".into()));
    let mut client = Client::registered(Encoding::Pickle);
    let reason = client.frame(Bytes::from_static(b"\x80\x03cos\nsystem\n."));
    assert!(matches!(closed(&reason), CloseReason::Message(_)));
}

#[test]
fn wrong_arguments_are_type_errors() {
    let mut client = Client::registered(Encoding::Pickle);
    for (method, args) in [
        ("loadBefore", vec![OID.into()]),
        ("getInvalidations", vec![5.into()]),
        ("lastTransaction", vec![Value::None]),
        ("new_oids", vec![Value::str("many")]),
    ] {
        let (class, _) = client.replied(method, args).unwrap_err();
        assert_eq!(class, "builtins.TypeError", "{method}");
    }
    let (class, _) = client.replied("getTid", vec![Value::bytes(b"short")]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.POSKeyError");
}

#[test]
fn a_transaction_has_the_token_that_its_client_gives_it() {
    let mut client = Client::registered(Encoding::Msgpack);
    let token = TransactionToken { client: [3; 16], number: 9 };
    let bytes = || Value::bytes(&token.to_bytes());
    client.begin_and_store(1);
    assert!(client.notify("transaction_token", vec![Value::Int(1), bytes()]).is_empty());
    match &client.call("vote", vec![Value::Int(1)])[..] {
        [Effect::Vote(request)] => assert_eq!(request.token, Some(token)),
        other => panic!("{other:?}"),
    }
    match &client.call("transaction_outcome", vec![bytes(), Value::bytes(&[1; 8])])[..] {
        [Effect::Outcome { token: asked, since, .. }] => {
            assert_eq!((*asked, *since), (token, Tid(0x0101_0101_0101_0101)));
        }
        other => panic!("{other:?}"),
    }
    // Only whoever writes has transactions.
    let mut reader = Client::connect(Encoding::Msgpack, true);
    reader.call("register", vec![Value::str("1"), true.into()]);
    reader.session.registered(true);
    let refused = reader.replied("transaction_outcome", vec![bytes(), Value::bytes(&[1; 8])]);
    assert_eq!(refused.unwrap_err().0, "ZODB.POSException.ReadOnlyError");
}

#[test]
fn a_token_of_the_wrong_size_fails_the_vote() {
    let mut client = Client::registered(Encoding::Pickle);
    client.begin_and_store(1);
    assert!(
        client.notify("transaction_token", vec![Value::Int(1), Value::bytes(b"short")]).is_empty()
    );
    let refused = client.replied("vote", vec![Value::Int(1)]).unwrap_err();
    assert!(format!("{refused:?}").contains("has 24 bytes, this one has 5"), "{refused:?}");
}

#[test]
fn texts_that_do_not_fit_the_file_fail_the_vote() {
    let mut client = Client::registered(Encoding::Pickle);
    let long = Value::bytes(&[b'x'; 65_536]);
    let text = Value::bytes(b"");
    assert!(client.notify("tpc_begin", vec![1.into(), long, text, Value::Dict(vec![])]).is_empty());
    let (class, _) = client.replied("vote", vec![1.into()]).unwrap_err();
    assert_eq!(class, "ZODB.FileStorage.FileStorage.FileStorageError");
}

proptest::proptest! {
    #[test]
    fn any_frame_is_answered_or_closes(frame: Vec<u8>) {
        for encoding in [Encoding::Pickle, Encoding::Msgpack] {
            let mut client = Client::registered(encoding);
            client.frame(Bytes::from(frame.clone()));
        }
    }
}

/// An upload that is kept, and one that goes with its transaction.
struct Counted(Arc<std::sync::atomic::AtomicU32>);

impl StagedFile for Counted {
    fn keep(self: Box<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

fn upload() -> Upload {
    Upload { transfer: standby_types::Transfer([1; 16]), len: 4, sha256: [2; 32] }
}

#[test]
fn blobs_belong_to_the_transaction() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let mut client = Client::registered(encoding);
        client.begin_and_store(1);
        assert!(matches!(client.notify("storeBlobStart", vec![])[..], [Effect::BlobStart]));
        let effects = client.notify("storeBlobChunk", vec![Value::bytes(b"blob")]);
        assert!(matches!(&effects[..], [Effect::BlobChunk(bytes)] if &bytes[..] == b"blob"));
        let end = vec![OID.into(), TID.into(), Value::bytes(b"data"), 1.into()];
        let effects = client.notify("storeBlobEnd", end);
        assert!(matches!(effects[..], [Effect::BlobEnd(Oid(1))]), "{effects:?}");
        let kept = Arc::new(std::sync::atomic::AtomicU32::new(0));
        client.session.staged(Oid(1), Ok((upload(), Box::new(Counted(kept.clone())))));
        client.call("vote", vec![1.into()]);
        client.session.voted(VoteOutcome::Answer(VoteAnswer::Voted)).unwrap();
        let mut effects = client.call("tpc_finish", vec![1.into()]);
        let Some(Effect::Finish { transaction, .. }) = effects.first_mut() else { panic!() };
        let source = BlobSource::Upload(upload());
        let blobs = transaction.take_blobs();
        assert_eq!(blobs.all, [standby_types::Blob { oid: Oid(1), source }]);
        blobs.keep();
        assert_eq!(kept.load(std::sync::atomic::Ordering::Relaxed), 1);
    }
}

#[test]
fn a_failed_upload_fails_the_vote() {
    let mut client = Client::registered(Encoding::Pickle);
    client.begin_and_store(1);
    client.session.staged(Oid(1), Err(ClientError::storage("no space")));
    let (class, _) = client.replied("vote", vec![1.into()]).unwrap_err();
    assert_eq!(class, "ZODB.POSException.StorageError");
}

/// The published suite does it, and is on its way before the server has seen it.
#[test]
fn data_that_are_no_bytes_fail_the_vote_only() {
    let mut client = Client::registered(Encoding::Msgpack);
    client.begin_and_store(2);
    let store = vec![OID.into(), TID.into(), Value::str("text"), 2.into()];
    assert!(client.notify("storea", store).is_empty());
    let (class, _) = client.replied("vote", vec![2.into()]).unwrap_err();
    assert_eq!(class, "builtins.TypeError");
    // Of another transaction there is nobody to tell.
    let store = vec![OID.into(), TID.into(), Value::str("text"), 9.into()];
    closed(&client.notify("storea", store));
}

#[test]
fn uploads_out_of_order_close_the_connection() {
    let end = || vec![OID.into(), TID.into(), Value::bytes(b"data"), 1.into()];
    let shared = |name: &str| {
        vec![OID.into(), TID.into(), Value::bytes(b"data"), Value::str(name), 1.into()]
    };
    let cases: Vec<Vec<(&str, Vec<Value>)>> = vec![
        vec![("storeBlobChunk", vec![Value::bytes(b"x")])],
        vec![("storeBlobEnd", end())],
        vec![("storeBlobStart", vec![]), ("storeBlobStart", vec![])],
        vec![("storeBlobShared", shared("../x.tmp"))],
        vec![("storeBlobShared", shared("x.blob"))],
        vec![("storeBlobShared", shared("tmp"))],
    ];
    for calls in cases {
        let mut client = Client::registered(Encoding::Pickle);
        client.begin_and_store(1);
        let last = calls.into_iter().map(|(method, args)| client.notify(method, args)).last();
        let effects = last.unwrap();
        assert!(matches!(effects[..], [Effect::Close(CloseReason::OneWay { .. })]), "{effects:?}");
    }
    for name in ["x.tmp", "x.tmp1"] {
        let mut client = Client::registered(Encoding::Pickle);
        client.begin_and_store(1);
        let effects = client.notify("storeBlobShared", shared(name));
        assert!(matches!(&effects[..], [Effect::BlobShared { oid: Oid(1), name: n }] if n == name));
    }
}

/// Each kind of change, of check, and of what is worked out later counts.
#[test]
fn a_transaction_of_too_many_objects_fails_at_the_vote() {
    let oid = |n: u8| Value::bytes(&[0, 0, 0, 0, 0, 0, 0, n]);
    let (serial, data, name) = (Value::bytes(&TID), Value::bytes(b"data"), Value::Int(1));
    let undo = Value::bytes(b"AwAAAAAAAAE=");
    type Arguments<'a> = &'a dyn Fn(u8) -> Vec<Value>;
    let calls: [(&str, Arguments<'_>); 5] = [
        ("storea", &|n| vec![oid(n), serial.clone(), data.clone(), name.clone()]),
        ("deleteObject", &|n| vec![oid(n), serial.clone(), name.clone()]),
        ("checkCurrentSerialInTransaction", &|n| vec![oid(n), serial.clone(), name.clone()]),
        ("restorea", &|n| vec![oid(n), serial.clone(), data.clone(), serial.clone(), name.clone()]),
        ("undoa", &|_| vec![undo.clone(), name.clone()]),
    ];
    for (method, args) in calls {
        for (more, refused) in [(4, false), (5, true), (100, true)] {
            let mut client = Client::registered(Encoding::Pickle);
            client.begin_and_store(1);
            (0..more).for_each(|n| assert!(client.notify(method, args(n + 10)).is_empty()));
            let effects = client.call("vote", vec![name.clone()]);
            match &effects[..] {
                [Effect::Vote(_)] => assert!(!refused, "{method} {more}"),
                [Effect::Send(frame)] => {
                    let (_, error) = client.result(frame).unwrap_err();
                    let error = format!("{error:?}");
                    assert!(
                        refused && error.contains("transaction-objects"),
                        "{method} {more}: {error}"
                    );
                }
                other => panic!("{method} {more}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_transaction_of_too_many_bytes_fails_at_the_vote() {
    let mut client = Client::registered(Encoding::Pickle);
    client.begin_and_store(1);
    // The same object again and again is kept again and again.
    for _ in 0..100 {
        client.store(1, TID, &[7; 200]);
    }
    let (_, error) = client.replied("vote", vec![1.into()]).unwrap_err();
    assert!(format!("{error:?}").contains("transaction-size"), "{error:?}");
    // The next one is as any other.
    client.begin_and_store(2);
    assert!(matches!(client.call("vote", vec![2.into()])[..], [Effect::Vote(_)]));
}
