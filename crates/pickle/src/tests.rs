use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;

fn read(bytes: &[u8]) -> Result<Value, DecodeError> {
    decode(&Bytes::copy_from_slice(bytes), |module, _| module == "builtins")
}

fn written(value: &Value) -> Vec<u8> {
    let mut out = BytesMut::new();
    encode(value, &mut out);
    out.to_vec()
}

/// The same call as CPython writes it with its memo, in protocols 3 and 4.
#[test]
fn reads_what_python_writes() {
    let expected = Value::Tuple(vec![
        Value::Int(1),
        Value::Bool(false),
        Value::str("ping"),
        Value::Tuple(vec![
            Value::None,
            Value::Int(-2),
            Value::Int(1 << 40),
            Value::Float(1.5),
            Value::List(vec![Value::str("a")]),
            Value::Dict(vec![(Value::str("k"), Value::bytes(b"y"))]),
        ]),
    ]);
    let protocol3 = b"\x80\x03(K\x01\x89X\x04\x00\x00\x00pingq\x00(NJ\xfe\xff\xff\xff\
        \x8a\x06\x00\x00\x00\x00\x00\x01G?\xf8\x00\x00\x00\x00\x00\x00]q\x01X\x01\x00\x00\x00aq\x02a\
        }q\x03X\x01\x00\x00\x00kq\x04C\x01yq\x05stq\x06tq\x07.";
    let protocol4 =
        b"\x80\x04\x95=\x00\x00\x00\x00\x00\x00\x00(K\x01\x89\x8c\x04ping\x94(NJ\xfe\xff\xff\xff\
        \x8a\x06\x00\x00\x00\x00\x00\x01G?\xf8\x00\x00\x00\x00\x00\x00]\x94\x8c\x01a\x94a\
        }\x94\x8c\x01k\x94C\x01y\x94st\x94t\x94.";
    assert_eq!(read(protocol3), Ok(expected.clone()));
    assert_eq!(read(protocol4), Ok(expected.clone()));
    assert_eq!(read(&written(&expected)), Ok(expected));
}

#[test]
fn writes_what_zeo_writes() {
    let message = Value::Tuple(vec![
        Value::Int(1),
        Value::Int(0),
        Value::str(".reply"),
        Value::bytes(&[0; 8]),
    ]);
    assert_eq!(
        written(&message),
        b"\x80\x03(K\x01K\x00X\x06\x00\x00\x00.replyC\x08\0\0\0\0\0\0\0\0t.".to_vec()
    );
}

#[test]
fn integers_of_every_size() {
    for i in [0, 255, 256, 65_535, 65_536, -1, i64::from(i32::MIN), 1 << 31, -(1 << 31) - 1]
        .into_iter()
        .chain((32..63).flat_map(|n| [1 << n, -(1 << n), (1 << n) - 1]))
        .chain([i64::MAX, i64::MIN])
    {
        assert_eq!(read(&written(&Value::Int(i))), Ok(Value::Int(i)));
    }
    let big = Value::Long(vec![0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(read(&written(&big)), Ok(big));
}

#[test]
fn sets_come_through_and_other_classes_do_not() {
    let set = read(b"\x80\x03cbuiltins\nset\n]K\x01a\x85R.").unwrap();
    assert_eq!(read(&written(&set)), Ok(set));
    assert_eq!(
        read(b"\x80\x03cos\nsystem\nC\x02ls\x85R."),
        Err(DecodeError::Forbidden("os.system".into()))
    );
}

#[test]
fn class_names_of_records() {
    let global = Bytes::from_static(b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x01.}.");
    assert_eq!(class_name(&global).as_deref(), Some("persistent.mapping.PersistentMapping"));
    let pair = Bytes::from_static(b"\x80\x02cBTrees.OOBTree\nOOBTree\nN\x86.N.");
    assert_eq!(class_name(&pair).as_deref(), Some("BTrees.OOBTree.OOBTree"));
    assert_eq!(class_name(&Bytes::from_static(b"no pickle")), None);
}

#[test]
fn extensions_of_python_2_are_texts() {
    let text = |text: &str| Value::Str(text.into());
    let expected = Value::Dict(vec![(text("user"), text("a'\\")), (text("n"), Value::Int(1))]);
    for pickle in [
        &b"(dp0\nS'user'\np1\nS\"a'\\\\\"\np2\nsS'n'\np3\nI1\ns."[..],
        b"}q\x01(U\x04userq\x02U\x03a'\\q\x03U\x01nK\x01u.",
        b"\x80\x02}q\x01(T\x04\0\0\0userq\x02X\x03\0\0\0a'\\q\x03U\x01nK\x01u.",
        b"(dp0\nVuser\np1\nVa'\\u005c\np2\nsVn\np3\nI1\ns.",
    ] {
        let read = decode_with_texts(&Bytes::copy_from_slice(pickle), |_, _| false);
        assert_eq!(read.as_ref(), Ok(&expected), "{}", pickle.escape_ascii());
    }
    // What is no ASCII stays what it is, and so does all in messages.
    let bytes = Bytes::from_static(b"U\x01\xe4.");
    assert_eq!(decode_with_texts(&bytes, |_, _| false), Ok(Value::bytes(b"\xe4")));
    assert_eq!(read(b"U\x01a."), Ok(Value::bytes(b"a")));
}

#[test]
fn a_pickle_takes_memory_in_proportion_to_its_length() {
    for (name, code) in [("sets", 0x8f), ("nothing", b'N'), ("lists", b']'), ("memos", 0x94)] {
        let pickle = |count| [&b"\x80\x04N"[..], &vec![code; count], b"."].concat();
        assert!(read(&pickle(1000)).is_ok(), "{name}");
        assert_eq!(read(&pickle(1 << 20)), Err(DecodeError::TooLarge), "{name}");
    }
    // A million oids, each with its number in the memo, as Python writes them.
    let mut oids = b"\x80\x03(".to_vec();
    for number in 0..1_000_000u32 {
        oids.extend_from_slice(b"C\x08\0\0\0\0");
        oids.extend_from_slice(&number.to_be_bytes());
        oids.push(b'r');
        oids.extend_from_slice(&number.to_le_bytes());
    }
    oids.extend_from_slice(b"t.");
    assert!(read(&oids).is_ok());
}

#[test]
fn bombs_are_refused() {
    let mut deep = b"\x80\x03N".to_vec();
    deep.extend(std::iter::repeat_n(0x85, 1_000_000));
    deep.push(b'.');
    assert_eq!(read(&deep), Err(DecodeError::TooLarge));

    // Each step makes a pair of the memo's last value: 2^60 nodes in 300 bytes.
    let mut laughs = b"\x80\x03Nq\x00".to_vec();
    for i in 0..60 {
        laughs.extend([b'h', i, b'h', i, 0x86, b'q', i + 1]);
    }
    laughs.push(b'.');
    assert_eq!(read(&laughs), Err(DecodeError::TooLarge));
}

#[test]
fn copies_of_a_long_text_are_bounded() {
    let mut bytes = b"\x80\x03(X".to_vec();
    bytes.extend(1_000_000u32.to_le_bytes());
    bytes.extend(vec![b'x'; 1_000_000]);
    bytes.extend(b"q\x00");
    bytes.extend(b"h\x00".repeat(100_000));
    bytes.extend(b"t.");
    assert_eq!(read(&bytes), Err(DecodeError::TooLarge));
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        (-1e300..1e300).prop_map(Value::Float),
        ".*".prop_map(Value::Str),
        proptest::collection::vec(any::<u8>(), 0..400).prop_map(|v| Value::Bytes(v.into())),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::Tuple),
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::List),
            proptest::collection::vec((inner.clone(), inner), 0..4).prop_map(Value::Dict),
        ]
    })
}

proptest! {
    #[test]
    fn round_trip(value in value()) {
        prop_assert_eq!(read(&written(&value)), Ok(value));
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes);
    }

    #[test]
    fn damaged_pickles_are_read_or_refused(value in value(), at in any::<usize>(), byte: u8) {
        let mut bytes = written(&value);
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = read(&bytes);
    }
}
