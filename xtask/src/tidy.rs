//! The house rules that a program can check. They start narrow and grow: a rule is a function from a file to complaints,
//! or, where files must agree with each other or with what Cargo says, from all of them.

mod documents;
mod edges;
mod refusals;
mod rooms;
mod tables;
mod unsafes;

pub(crate) use documents::commands;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use casemate_hwtests::LabError;

use crate::steps::workspace;

/// A file longer than this wants to be two.
const LINES_MAX: usize = 700;
/// Directories that hold nothing written by hand.
const SKIPPED: &[&str] = &[".git", "target", "built", "corpus"];
/// Endings of the files that rules look at.
const TEXTS: &[&str] = &["rs", "toml", "md", "wit", "sh", "yml", "html", "css", "js", "svg"];
/// Where machines keep what is theirs alone: no file of the project's has business there.
const WORKPLACES: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

/// A file as the rules see it.
struct File<'a> {
    /// Relative to the workspace.
    path: &'a Path,
    text: &'a str,
}

const RULES: &[fn(&File) -> Vec<String>] =
    &[is_not_too_long, names_no_path_of_a_machine, begins_with_its_principles, leaves_nothing_to_do];

/// `cargo xtask tidy`.
pub(crate) fn run() -> Result<ExitCode, LabError> {
    Ok(if holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks every file, prints the complaints, and returns whether there were none.
pub(crate) fn holds() -> bool {
    let texts = read_all();
    let files: Vec<File> = texts.iter().map(|(path, text)| File { path, text }).collect();
    let mut complaints: Vec<String> =
        files.iter().flat_map(|file| RULES.iter().flat_map(move |rule| rule(file))).collect();
    let architecture = files.iter().find(|file| file.path == Path::new("ARCHITECTURE.md"));
    let architecture = architecture.map_or("", |file| file.text);
    complaints.extend(documents::complaints(&files));
    complaints.extend(refusals::complaints(&files));
    complaints.extend(unsafes::complaints(&files, architecture));
    complaints.extend(edges::complaints(architecture));
    for complaint in &complaints {
        println!("{complaint}");
    }
    println!("{} files, {} complaints", files.len(), complaints.len());
    complaints.is_empty()
}

/// Every file that is text, by its path in the workspace, sorted.
pub(crate) fn read_all() -> Vec<(PathBuf, String)> {
    let mut paths = Vec::new();
    collect(workspace(), &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        // What is not text holds nothing for these rules.
        let text = fs::read_to_string(&path).ok()?;
        Some((path.strip_prefix(workspace()).unwrap_or(&path).to_owned(), text))
    };
    paths.into_iter().filter_map(read).collect()
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            collect(&entry.path(), paths);
        } else if kind.is_file() && is_text(&name) {
            paths.push(entry.path());
        }
    }
}

fn is_text(name: &str) -> bool {
    match name.rsplit_once('.') {
        Some((_, ending)) => TEXTS.contains(&ending),
        // Scripts and the like.
        None => true,
    }
}

fn is_not_too_long(file: &File) -> Vec<String> {
    let lines = file.text.lines().count();
    if lines <= LINES_MAX {
        return Vec::new();
    }
    vec![format!(
        "{}: {lines} lines; {LINES_MAX} at most, so split it by what belongs together",
        file.path.display()
    )]
}

fn names_no_path_of_a_machine(file: &File) -> Vec<String> {
    let own = format!("{}/", workspace().display());
    // A path such as /src says nothing about a machine.
    let own = (workspace().components().count() >= 3).then_some(own.as_str());
    let places = || WORKPLACES.iter().copied().chain(own);
    let named = |line: &str| places().find(|place| line.contains(place)).map(str::to_owned);
    let lines = file.text.lines().enumerate().filter_map(|(n, line)| Some((n, named(line)?)));
    lines
        .map(|(n, place)| format!("{}:{}: names {place}, a path of some machine", file.path.display(), n + 1))
        .collect()
}

fn begins_with_its_principles(file: &File) -> Vec<String> {
    let is_front = file.path.file_name().is_some_and(|name| name == "lib.rs" || name == "main.rs");
    if !is_front || file.text.starts_with("//! ") {
        return Vec::new();
    }
    vec![format!("{}: does not begin with //!, what this crate is and holds to", file.path.display())]
}

fn leaves_nothing_to_do(file: &File) -> Vec<String> {
    if file.path.extension().is_none_or(|ending| ending != "rs") {
        return Vec::new();
    }
    let words = [concat!("todo", "!("), concat!("unimplemented", "!(")];
    let lines =
        file.text.lines().enumerate().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
    lines.map(|(n, _)| format!("{}:{}: leaves something undone", file.path.display(), n + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_and_own_paths_are_found() {
        let long = "x\n".repeat(LINES_MAX + 1);
        let file = |text| is_not_too_long(&File { path: Path::new("a.rs"), text }).len();
        assert_eq!((file(&long), file(&long[2..])), (1, 0));
        let own = format!("see {}/src", workspace().display());
        let places = WORKPLACES.iter().map(|place| format!("in {place}x")).chain([own]);
        for text in places {
            let found = names_no_path_of_a_machine(&File { path: Path::new("a.md"), text: &text });
            assert_eq!(found.len(), 1, "{text}");
        }
        assert_eq!(
            names_no_path_of_a_machine(&File { path: Path::new("a.md"), text: "/var/lib/casemate" }).len(),
            0
        );
    }

    #[test]
    fn fronts_and_what_is_left_to_do() {
        let front = |path, text| begins_with_its_principles(&File { path: Path::new(path), text }).len();
        assert_eq!((front("src/a/src/lib.rs", "//! A.\n"), front("src/a/src/b.rs", "mod c;")), (0, 0));
        assert_eq!((front("src/a/src/lib.rs", "mod b;"), front("src/a/src/main.rs", "// A.\n")), (1, 1));
        let left = |path, text| leaves_nothing_to_do(&File { path: Path::new(path), text }).len();
        let text = concat!("fn a() {\n    todo", "!()\n}\n");
        assert_eq!((left("a.rs", text), left("a.md", text), left("a.rs", "fn a() {}")), (1, 0, 0));
    }

    #[test]
    fn files_are_found_and_targets_are_not() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["src/a.rs", "target/b.rs", "c.png", ".ci/run"] {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let mut paths = Vec::new();
        collect(directory.path(), &mut paths);
        paths.sort();
        assert_eq!(paths, [directory.path().join(".ci/run"), directory.path().join("src/a.rs")]);
    }
}
