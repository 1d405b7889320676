//! Values of a record that are, or make, a persistent id. Source of the forms: the module text of
//! `ZODB/serialize.py`, `referencesf` and `ObjectReader._persistent_load` there.
//!
//! An oid is eight bytes, in one of these forms:
//!
//! - a byte string, or text of eight ASCII characters;
//! - `_codecs.encode(text, 'latin1')`: how Python 3 writes byte strings with protocols 0 to 2;
//! - `copy_reg._reconstructor(zodbpickle.binary, str, string)`, `zodbpickle.binary(string)` or its
//!   `__new__`: how Python 2 writes an instance of `zodbpickle.binary`.
//!
//! Everything else is [`Item::Other`], and nothing that is made of it is an oid.

/// A value on the stack of a pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// Short text.
    Text(Span),
    /// A short byte string.
    Bytes(Span),
    /// Something that makes, or is part of what makes, byte strings.
    Callable(Callable),
    /// A tuple that begins with one of these: its number in [`Values`].
    Tuple(u32),
    /// A list that is still empty, and is in no memo: it has no number yet.
    EmptyList,
    /// A list that may begin with one of these: its number in [`Values`].
    List(u32),
    /// Anything else.
    Other,
}

/// Where a short string stands: in the record, or after it, in what [`Values`] keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    start: u32,
    len: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callable {
    /// `_codecs.encode`
    Encode,
    /// `copy_reg._reconstructor`
    Reconstructor,
    /// `zodbpickle.binary`
    Binary,
    /// `str` and `bytes`
    Plain,
}

/// What a persistent id refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// An object of this database, which is kept alive.
    Strong([u8; 8]),
    /// A weak reference, or an object of another database.
    Elsewhere,
}

/// No form of an oid, and no name in one, is longer.
const SHORT: usize = 64;

/// The first items of a tuple or a list, as many as a form has.
#[derive(Clone, Copy, Debug)]
struct Shape {
    first: [Item; 3],
    /// 4 stands for more than 3.
    len: u8,
}

impl Shape {
    const EMPTY: Shape = Shape { first: [Item::Other; 3], len: 0 };

    fn push(&mut self, item: Item) {
        if let Some(place) = self.first.get_mut(usize::from(self.len)) {
            *place = item;
            self.len += 1;
        } else {
            self.len = 4;
        }
    }

    fn of(items: &[Item]) -> Shape {
        let mut shape = Shape::EMPTY;
        items.iter().for_each(|item| shape.push(*item));
        shape
    }

    /// All items, if they are few.
    fn items(&self) -> Option<&[Item]> {
        self.first.get(..usize::from(self.len))
    }
}

/// What items of one record stand for.
#[derive(Debug)]
pub(crate) struct Values<'a> {
    record: &'a [u8],
    made: Vec<u8>,
    tuples: Vec<Shape>,
    lists: Vec<Shape>,
}

impl<'a> Values<'a> {
    pub(crate) fn new(record: &'a [u8]) -> Self {
        Values { record, made: Vec::new(), tuples: Vec::new(), lists: Vec::new() }
    }

    /// A string that stands in the record.
    pub(crate) fn string(start: usize, len: usize, is_text: bool) -> Item {
        let (Ok(start), Ok(len), true) = (u32::try_from(start), u8::try_from(len), len <= SHORT)
        else {
            return Item::Other;
        };
        let span = Span { start, len };
        if is_text { Item::Text(span) } else { Item::Bytes(span) }
    }

    /// A string that does not stand in the record as it is.
    pub(crate) fn made(&mut self, bytes: &[u8], is_text: bool) -> Item {
        if bytes.len() > SHORT {
            return Item::Other;
        }
        let start = self.record.len() + self.made.len();
        self.made.extend_from_slice(bytes);
        Values::string(start, bytes.len(), is_text)
    }

    pub(crate) fn tuple(&mut self, items: &[Item]) -> Item {
        if matches!(items.first(), None | Some(Item::Other)) {
            return Item::Other;
        }
        Values::numbered(&mut self.tuples, Shape::of(items)).map_or(Item::Other, Item::Tuple)
    }

    pub(crate) fn list(&mut self, items: &[Item]) -> Item {
        self.extended(Item::EmptyList, items)
    }

    /// What `list` is with more items.
    pub(crate) fn extended(&mut self, list: Item, items: &[Item]) -> Item {
        match (list, items.first()) {
            (list, None) => list,
            (Item::EmptyList, Some(Item::Other)) => Item::Other,
            (Item::EmptyList, _) => {
                Values::numbered(&mut self.lists, Shape::of(items)).map_or(Item::Other, Item::List)
            }
            (Item::List(number), _) => {
                items.iter().for_each(|item| self.lists[number as usize].push(*item));
                list
            }
            // An instance of a class that is like a list.
            (other, _) => other,
        }
    }

    /// The value as it goes into the memo: what is done to a list there is done to the one on the
    /// stack.
    pub(crate) fn shared(&mut self, item: Item) -> Item {
        match item {
            Item::EmptyList => {
                Values::numbered(&mut self.lists, Shape::EMPTY).map_or(Item::Other, Item::List)
            }
            other => other,
        }
    }

    fn numbered(shapes: &mut Vec<Shape>, shape: Shape) -> Option<u32> {
        let number = u32::try_from(shapes.len()).ok()?;
        shapes.push(shape);
        Some(number)
    }

    /// What a name of a module stands for.
    pub(crate) fn global(module: &[u8], name: &[u8]) -> Item {
        Item::Callable(match (module, name) {
            (b"_codecs" | b"codecs", b"encode") => Callable::Encode,
            (b"copy_reg" | b"copyreg", b"_reconstructor") => Callable::Reconstructor,
            (b"zodbpickle", b"binary") => Callable::Binary,
            (b"__builtin__" | b"builtins", b"str" | b"bytes") => Callable::Plain,
            _ => return Item::Other,
        })
    }

    /// [`global`](Values::global), by names on the stack.
    pub(crate) fn named(&self, module: Item, name: Item) -> Item {
        match (self.bytes(module), self.bytes(name)) {
            (Some(module), Some(name)) => Values::global(module, name),
            _ => Item::Other,
        }
    }

    /// What a call gives.
    pub(crate) fn call(&mut self, callable: Item, arguments: Item) -> Item {
        let arguments = match arguments {
            Item::Tuple(tuple) => self.tuples[tuple as usize],
            _ => return Item::Other,
        };
        match (callable, arguments.items()) {
            (Item::Callable(Callable::Encode), Some([text, encoding])) => {
                self.encoded(*text, *encoding)
            }
            (
                Item::Callable(Callable::Reconstructor),
                Some([Item::Callable(Callable::Binary), Item::Callable(Callable::Plain), string]),
            )
            | (Item::Callable(Callable::Binary), Some([string])) => match *string {
                Item::Text(span) | Item::Bytes(span) => Item::Bytes(span),
                _ => Item::Other,
            },
            _ => Item::Other,
        }
    }

    fn encoded(&mut self, text: Item, encoding: Item) -> Item {
        let (Some(text), Some(encoding)) = (self.text(text), self.text(encoding)) else {
            return Item::Other;
        };
        let bytes = match encoding.to_ascii_lowercase().replace('_', "-").as_str() {
            "latin1" | "latin-1" | "iso-8859-1" => {
                text.chars().map(|char| u8::try_from(char).ok()).collect()
            }
            "ascii" if text.is_ascii() => Some(text.as_bytes().to_vec()),
            "utf8" | "utf-8" => Some(text.as_bytes().to_vec()),
            _ => None,
        };
        bytes.map_or(Item::Other, |bytes| self.made(&bytes, false))
    }

    /// What a persistent id refers to; `None` if it has no form that ZODB knows.
    pub(crate) fn target(&self, id: Item) -> Option<Target> {
        let list = match id {
            Item::List(list) => &self.lists[list as usize],
            Item::Tuple(tuple) => {
                return self.oid(self.tuples[tuple as usize].first[0]).map(Target::Strong);
            }
            _ => return self.oid(id).map(Target::Strong),
        };
        let known = match list.items()? {
            [oid] => self.oid(*oid).is_some(),
            [kind, Item::Tuple(_) | Item::List(_)] => {
                matches!(self.bytes(*kind), Some(b"w" | b"n" | b"m"))
            }
            _ => false,
        };
        known.then_some(Target::Elsewhere)
    }

    /// The oid that a line of protocol 0 names.
    pub(crate) fn target_of_line(line: &[u8]) -> Option<Target> {
        <[u8; 8]>::try_from(line).ok().filter(|oid| oid.is_ascii()).map(Target::Strong)
    }

    fn oid(&self, item: Item) -> Option<[u8; 8]> {
        let bytes = self.bytes(item)?.try_into().ok()?;
        match item {
            Item::Text(_) => Some(bytes).filter(|bytes: &[u8; 8]| bytes.is_ascii()),
            _ => Some(bytes),
        }
    }

    /// The bytes of a string, in UTF-8 if it is text.
    fn bytes(&self, item: Item) -> Option<&[u8]> {
        let (Item::Text(span) | Item::Bytes(span)) = item else { return None };
        let (start, len) = (span.start as usize, usize::from(span.len));
        match start.checked_sub(self.record.len()) {
            None => self.record.get(start..start + len),
            Some(start) => self.made.get(start..start + len),
        }
    }

    /// The text of a string; of a byte string (which Python 2 wrote) only if it is ASCII.
    fn text(&self, item: Item) -> Option<String> {
        let text = std::str::from_utf8(self.bytes(item)?).ok()?;
        (text.is_ascii() || matches!(item, Item::Text(_))).then(|| text.to_string())
    }
}
