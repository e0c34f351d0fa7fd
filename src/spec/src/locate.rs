//! From a place in a TOML text to the line and key a person would look for.

use std::path::Path;

use crate::Location;

/// The location of the byte `offset` in `source`: its line and the key that line defines, with its tables.
///
/// The text may be malformed: this is called for syntax errors too, and then names what can be known.
pub(crate) fn locate(file: &Path, source: &str, offset: usize) -> Location {
    let mut tables: Vec<(&str, usize)> = Vec::new();
    let mut table = String::new();
    let mut start = 0;
    let mut line = 1;
    let mut key = String::new();
    for text in source.split_inclusive('\n') {
        let trimmed = text.trim();
        if let Some(name) = header(trimmed, "[[", "]]") {
            let count = match tables.iter_mut().find(|(known, _)| *known == name) {
                Some((_, count)) => {
                    *count += 1;
                    *count
                }
                None => {
                    tables.push((name, 0));
                    0
                }
            };
            table = format!("{name}[{count}]");
        } else if let Some(name) = header(trimmed, "[", "]") {
            table = name.to_owned();
        }
        if offset < start + text.len() {
            key = match trimmed.split_once('=') {
                Some((name, _)) if !trimmed.starts_with('[') && table.is_empty() => name.trim().to_owned(),
                Some((name, _)) if !trimmed.starts_with('[') => format!("{table}.{}", name.trim()),
                _ => table,
            };
            break;
        }
        start += text.len();
        line += 1;
    }
    Location { file: file.to_owned(), line, key }
}

fn header<'a>(line: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let rest = line.strip_prefix(open)?;
    let (name, _) = rest.split_once(close)?;
    Some(name.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "name = 'a'\n[boot]\nkernel = 'k'\n[[disk]]\npath = '1'\n[[disk]]\npath = '2'\n";

    fn key_of(needle: &str) -> (usize, String) {
        let location = locate(Path::new("x"), TEXT, TEXT.find(needle).unwrap());
        (location.line, location.key)
    }

    #[test]
    fn finds_line_and_key() {
        assert_eq!(key_of("'a'"), (1, "name".into()));
        assert_eq!(key_of("'k'"), (3, "boot.kernel".into()));
        assert_eq!(key_of("'1'"), (5, "disk[0].path".into()));
        assert_eq!(key_of("'2'"), (7, "disk[1].path".into()));
        assert_eq!(key_of("[boot]"), (2, "boot".into()));
    }

    proptest! {
        #[test]
        fn never_panics(text in "(\\PC|\n|\\[|\\]|=){0,80}", offset in 0usize..100) {
            let _ = locate(Path::new("x"), &text, offset);
        }
    }
}
