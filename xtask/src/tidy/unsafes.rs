//! Unsafe code stands where `ARCHITECTURE.md` says, and nowhere else.

use std::path::Path;

use super::{File, tables};

/// The heading of the table: first cell, files or folders in backticks; last cell, why.
const TITLE: &str = "Unsafe code";

/// Unsafe code outside of the table, and lines of the table without any.
pub(super) fn complaints(files: &[File<'_>], architecture: &str) -> Vec<String> {
    let Some(rows) = tables::under(architecture, TITLE) else {
        return vec![format!("ARCHITECTURE.md: no table under {TITLE:?}")];
    };
    let mut complaints = Vec::new();
    let allowed: Vec<&str> =
        rows.iter().filter_map(|row| row.first()).flat_map(|cell| tables::ticked(cell)).collect();
    let found: Vec<&Path> = files.iter().filter(|file| has_unsafe(file)).map(|file| file.path).collect();
    for path in &found {
        if !allowed.iter().any(|place| path.starts_with(place)) {
            complaints
                .push(format!("{}: unsafe code, which ARCHITECTURE.md does not name there", path.display()));
        }
    }
    for place in allowed.iter().filter(|place| !found.iter().any(|path| path.starts_with(place))) {
        complaints.push(format!("ARCHITECTURE.md: {place} has no unsafe code"));
    }
    complaints
}

fn has_unsafe(file: &File<'_>) -> bool {
    let words = ["{", "fn", "impl", "extern", "trait"].map(|word| ["unsafe", word].join(" "));
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    file.path.extension().is_some_and(|ending| ending == "rs")
        && file.text.lines().filter(is_code).any(|line| words.iter().any(|word| line.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_it_is_named() {
        let table = "## Unsafe code\n| where | why |\n|---|---|\n| `src/a.rs`, `src/b` | ioctls |\n";
        let code = format!("let x = {} {{ y }};", "unsafe");
        let comment = format!("/// {code}");
        let file = |path, text| File { path: Path::new(path), text };
        let both = [file("src/a.rs", &code), file("src/b/c.rs", &code), file("src/d.rs", &comment)];
        assert_eq!(complaints(&both, table), [""; 0]);
        let third = [file("src/a.rs", &code), file("src/b/c.rs", &code), file("src/d.rs", &code)];
        assert!(complaints(&third, table)[0].contains("src/d.rs: unsafe code"));
        assert!(complaints(&both[..1], table)[0].contains("src/b has no unsafe code"));
        assert_eq!(complaints(&both, "").len(), 1);
    }
}
