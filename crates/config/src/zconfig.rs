//! The syntax of ZConfig files: sections, keys, definitions. What they mean is in `schema.rs`.

use std::collections::HashMap;
use std::path::Path;

/// Something is wrong with a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}")]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// A section, or the top of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Section {
    /// `filestorage` of `<filestorage main>`, in lower case.
    pub kind: String,
    /// `main` of `<filestorage main>`.
    pub name: Option<String>,
    pub line: usize,
    /// Its keys (in lower case) and values, in order.
    pub keys: Vec<(String, String, usize)>,
    /// The sections in it.
    pub sections: Vec<Section>,
}

/// Reads the text of a file.
pub fn parse(file: &Path, text: &str) -> Result<Section, ConfigError> {
    let file = file.display().to_string();
    let mut parser = Parser {
        definitions: HashMap::new(),
        open: vec![Section { line: 1, ..Section::default() }],
    };
    for (nth, text) in text.lines().enumerate() {
        let line = nth + 1;
        let error = |message: String| ConfigError { file: file.clone(), line, message };
        parser.line(line, text.trim()).map_err(error)?;
    }
    match parser.open.pop() {
        Some(top) if parser.open.is_empty() => Ok(top),
        unclosed => {
            let section = unclosed.unwrap_or_default();
            let message = format!("<{}> is not closed", section.kind);
            Err(ConfigError { file, line: section.line, message })
        }
    }
}

/// What the lines so far have said.
struct Parser {
    definitions: HashMap<String, String>,
    /// The sections that are not closed, each in the one before; the first is the file.
    open: Vec<Section>,
}

impl Parser {
    fn line(&mut self, line: usize, text: &str) -> Result<(), String> {
        if text.is_empty() || text.starts_with('#') {
            return Ok(());
        }
        if let Some(directive) = text.strip_prefix('%') {
            self.directive(directive)
        } else if let Some(header) = text.strip_prefix("</") {
            self.close(&header.trim_end_matches('>').trim().to_lowercase())
        } else if let Some(header) = text.strip_prefix('<') {
            let header = header
                .strip_suffix('>')
                .ok_or_else(|| format!("the section header {text:?} has no closing '>'"))?;
            self.open(line, text, header)
        } else {
            let (key, value) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            let value = substitute(value.trim(), &self.definitions)?;
            if let Some(section) = self.open.last_mut() {
                section.keys.push((key.to_lowercase(), value, line));
            }
            Ok(())
        }
    }

    fn directive(&mut self, directive: &str) -> Result<(), String> {
        let mut words = directive.splitn(3, char::is_whitespace);
        match (words.next(), words.next()) {
            (Some("define"), Some(name)) => {
                let value = substitute(words.next().unwrap_or("").trim(), &self.definitions)?;
                self.definitions.insert(name.to_lowercase(), value);
                Ok(())
            }
            (Some("import"), Some(_)) => Ok(()),
            _ => Err(format!(
                "unknown directive %{directive}; known are %define NAME VALUE and %import"
            )),
        }
    }

    fn open(&mut self, line: usize, text: &str, header: &str) -> Result<(), String> {
        let (header, empty) = match header.strip_suffix('/') {
            Some(header) => (header, true),
            None => (header, false),
        };
        let mut words = header.split_whitespace();
        let section = Section {
            kind: words.next().unwrap_or("").to_lowercase(),
            name: words.next().map(str::to_lowercase),
            line,
            ..Section::default()
        };
        if section.kind.is_empty() || words.next().is_some() {
            return Err(format!("{text:?} is not a section header: <TYPE> or <TYPE NAME>"));
        }
        match self.open.last_mut() {
            Some(parent) if empty => parent.sections.push(section),
            _ => self.open.push(section),
        }
        Ok(())
    }

    fn close(&mut self, kind: &str) -> Result<(), String> {
        let closed = self.open.pop().unwrap_or_default();
        match self.open.last_mut() {
            Some(parent) if closed.kind == kind => {
                parent.sections.push(closed);
                Ok(())
            }
            Some(_) => Err(format!(
                "</{kind}> closes nothing: <{}> of line {} is open",
                closed.kind, closed.line
            )),
            None => Err(format!("</{kind}> closes nothing")),
        }
    }
}

/// Replaces `$name` and `${name}`; `$$` stands for a dollar sign.
fn substitute(value: &str, definitions: &HashMap<String, String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let (name, after) = match after.strip_prefix('{') {
            Some(braced) => {
                braced.split_once('}').ok_or_else(|| format!("${{ without }} in {value:?}"))?
            }
            None => {
                let end = after.find(|c: char| !c.is_alphanumeric() && c != '_');
                after.split_at(end.unwrap_or(after.len()))
            }
        };
        let defined = definitions.get(&name.to_lowercase());
        out.push_str(defined.ok_or_else(|| format!("${name} is not defined (%define {name} …)"))?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Section, ConfigError> {
        parse(Path::new("zeo.conf"), text)
    }

    #[test]
    fn sections_keys_and_definitions() {
        let text = "%define HERE /srv\n# comment\n<zeo>\n  Address localhost: 8100\n</zeo>\n\
                    <filestorage Main>\n path $here/Data.fs\n blob-dir \
                    ${HERE}/b$$\n</filestorage>\n<empty/>\n";
        let top = read(text).unwrap();
        let kinds: Vec<_> = top.sections.iter().map(|s| s.kind.as_str()).collect();
        assert_eq!(kinds, ["zeo", "filestorage", "empty"]);
        assert_eq!(top.sections[0].keys, [("address".into(), "localhost: 8100".into(), 4)]);
        let storage = &top.sections[1];
        assert_eq!(storage.name.as_deref(), Some("main"));
        assert_eq!(storage.keys[0].1, "/srv/Data.fs");
        assert_eq!(storage.keys[1].1, "/srv/b$");
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, expected) in [
            ("<zeo>\naddress 1\n", "zeo.conf:1: <zeo> is not closed"),
            ("<zeo>\n</zoe>\n", "zeo.conf:2: </zoe> closes nothing: <zeo> of line 1 is open"),
            ("</zeo>", "zeo.conf:1: </zeo> closes nothing"),
            ("\npath $nowhere", "zeo.conf:2: $nowhere is not defined (%define nowhere …)"),
            ("<zeo", "zeo.conf:1: the section header \"<zeo\" has no closing '>'"),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(?s).*") {
            let _ = read(&text);
        }

        #[test]
        fn any_lines_are_read_or_refused(
            lines in proptest::collection::vec("(<|</|%define |\\$|\\$\\{)?[a-z]{0,3}[>/} \
            ]?[a-z]?", 0..10)
        ) {
            let _ = read(&lines.join("\n"));
        }
    }
}
