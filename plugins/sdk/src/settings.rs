//! What is wrong with settings, by the key.

use crate::Reason;

/// Settings that can't be read. The text is one line of JSON that Casemate made from TOML: line and column would tell its
/// reader nothing, so they are turned into the key.
pub(crate) fn reason(settings: &str, error: &serde_json::Error) -> Reason {
    let message = error.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    // An unknown key is named by the message, and by the place where it stands.
    let keys = keys_before(settings.get(..error.column()).unwrap_or(settings));
    let field = if keys.is_empty() { "settings".to_owned() } else { format!("settings.{}", keys.join(".")) };
    Reason::new("bad-settings", message).field(field)
}

/// The keys that lead to where a JSON text was cut off.
fn keys_before(text: &str) -> Vec<&str> {
    let mut keys = Vec::new();
    // How many keys there were when each open brace or bracket came, and whether it's a brace.
    let mut open: Vec<(usize, bool)> = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match first {
            '{' | '[' => open.push((keys.len(), first == '{')),
            '}' | ']' => {
                // What was within is done; the key that it belongs to may still be the one at fault.
                if let Some((count, _)) = open.pop() {
                    keys.truncate(count);
                }
            }
            ',' => {
                if let Some((count, true)) = open.last() {
                    keys.truncate(*count);
                }
            }
            '"' => {
                let within = &rest[1..];
                length = 1 + end_of_text(within).map_or(within.len(), |end| end + 1);
                let key = within.get(..length.saturating_sub(2)).unwrap_or(within);
                let is_key = rest[length..].trim_start().starts_with(':');
                // Cut off right behind a key: it's the key that isn't wanted.
                let is_unwanted = rest.len() == length
                    && open.last().is_some_and(|(count, brace)| *brace && keys.len() == *count);
                if is_key || is_unwanted {
                    keys.push(key);
                }
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    keys
}

/// Where a text of JSON's ends: its closing quote.
fn end_of_text(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.char_indices().find_map(|(at, character)| {
        let ends = character == '"' && !escaped;
        escaped = character == '\\' && !escaped;
        ends.then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "it's read into")]
    struct Settings {
        #[serde(default)]
        most: u32,
        #[serde(default)]
        tenants: BTreeMap<String, Quota>,
        #[serde(default)]
        names: Vec<String>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "it's read into")]
    struct Quota {
        guests: Option<u8>,
    }

    #[test]
    fn the_key_is_named() {
        for (text, field) in [
            (r#"{"most":"many"}"#, "settings.most"),
            (r#"{"most":-1}"#, "settings.most"),
            (r#"{"most":1,"names":["a",2]}"#, "settings.names"),
            (r#"{"names":["a:","{"],"most":true}"#, "settings.most"),
            (r#"{"tenants":{"ac\"me":{"guests":1},"ex":{"guests":256}}}"#, "settings.tenants.ex.guests"),
            (r#"{"tenants":{"acme":{"gusts":1}}}"#, "settings.tenants.acme.gusts"),
            (r#"{"tenants":{"acme":7}}"#, "settings.tenants.acme"),
            (r#"{"moost":1}"#, "settings.moost"),
            ("7", "settings"),
            ("", "settings"),
        ] {
            let error = serde_json::from_str::<Settings>(text).unwrap_err();
            assert_eq!(reason(text, &error).field.as_deref(), Some(field), "{text}: {error}");
        }
    }
}
