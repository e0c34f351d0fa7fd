//! Tables in Markdown files, where a document and the code must say the same.

/// The rows of the first table under the heading with this title, without its head; each a list of cells. `None` when
/// there is no such heading or no table under it.
pub(crate) fn under<'a>(text: &'a str, title: &str) -> Option<Vec<Vec<&'a str>>> {
    let heading = |line: &str| line.starts_with('#') && line.trim_start_matches('#').trim() == title;
    let rows: Vec<Vec<&str>> = text
        .lines()
        .skip_while(|line| !heading(line))
        .skip(1)
        .take_while(|line| !line.starts_with('#'))
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim().trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    (!rows.is_empty()).then_some(rows)
}

/// What stands between backticks in a cell.
pub(crate) fn ticked(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_under_a_heading_is_read() {
        let text = "# A\n| x |\n|---|\n| no |\n## B\ntext\n\n| crate | why |\n|---|---|\n| `a`, `b` | c |\n| `d` |  |\n\n| z |\n";
        let rows = under(text, "B").unwrap();
        assert_eq!(rows, [["`a`, `b`", "c"], ["`d`", ""]]);
        assert_eq!(ticked(rows[0][0]), ["a", "b"]);
        assert_eq!(under(text, "C"), None);
        assert_eq!(under("## B\n## C\n| a |\n|---|\n| b |\n", "B"), None);
    }
}
