//! What Markdown files promise: links that lead somewhere, and commands that exist.
//!
//! A block that begins with three backticks and the word `console` shows commands after `$ `, and what they print. Those that call this project's own
//! programs are checked: `cargo xtask` here, `casemate` by the built program (`cargo xtask test`).

use std::path::{Component, Path, PathBuf};

use super::File;

/// Links that lead nowhere, and commands of `cargo xtask` that it does not take.
pub(super) fn complaints(files: &[File<'_>]) -> Vec<String> {
    let documents = files.iter().filter(|file| file.path.extension().is_some_and(|ending| ending == "md"));
    documents.flat_map(|file| [links(file, files), xtask_commands(file)].concat()).collect()
}

fn links(file: &File<'_>, files: &[File<'_>]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in prose(file.text) {
        for target in targets(line) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let at = if path.is_empty() { file.path.to_owned() } else { beside(file.path, path) };
            let known = files.iter().find(|other| other.path == at);
            let there = known.is_some() || crate::steps::workspace().join(&at).exists();
            let headed = anchor.is_empty()
                || known.is_some_and(|known| anchors(known.text).any(|slug| slug == anchor));
            if !there || !headed {
                complaints
                    .push(format!("{}:{number}: the link to {target} leads nowhere", file.path.display()));
            }
        }
    }
    complaints
}

/// Lines outside of fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// The targets of `[text](target)` in a line.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|target| !target.contains(' '))
}

/// A path as written in `file`, from the root of the workspace.
fn beside(file: &Path, path: &str) -> PathBuf {
    let mut at = file.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => {
                at.pop();
            }
            Component::CurDir => {}
            other => at.push(other),
        }
    }
    at
}

/// How a heading is called in links, by GitHub's rule.
fn anchors(text: &str) -> impl Iterator<Item = String> + '_ {
    prose(text).filter_map(|(_, line)| {
        let title = line.trim_start_matches('#');
        (line.len() != title.len()).then(|| {
            let kept = title.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
        })
    })
}

/// The commands that a document shows in its `console` blocks, with their lines: words, without what a shell would do.
pub(crate) fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut commands = Vec::new();
    let mut block = None;
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            block = if block.is_none() { Some(language.trim()) } else { None };
        } else if block == Some("console")
            && let Some(command) = line.trim_start().strip_prefix("$ ")
        {
            let words = command.split_whitespace().skip_while(|word| *word == "sudo");
            let words = words.take_while(|word| !word.starts_with(['|', '>', '#', '&', ';']));
            commands.push((number, words.map(str::to_owned).collect()));
        }
    }
    commands
}

fn xtask_commands(file: &File<'_>) -> Vec<String> {
    use clap::Parser;
    let mut complaints = Vec::new();
    for (number, words) in commands(file.text) {
        let [cargo, xtask, rest @ ..] = words.as_slice() else { continue };
        if cargo != "cargo" || xtask != "xtask" {
            continue;
        }
        let parsed = crate::Arguments::try_parse_from(std::iter::once(&"xtask".to_owned()).chain(rest));
        // Help is an error to clap, and goes to stdout.
        if parsed.is_err_and(|error| error.use_stderr()) {
            complaints
                .push(format!("{}:{number}: cargo xtask takes no such words: {rest:?}", file.path.display()));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Vec<String> {
        let target = File { path: Path::new("docs/there.md"), text: "# It's a Title, here\n" };
        complaints(&[File { path: Path::new("docs/a.md"), text }, target])
    }

    #[test]
    fn links_must_lead_somewhere() {
        for good in [
            "[a](there.md) and [b](https://example.org/x) [c](../docs/there.md#its-a-title-here)",
            "# Top\n[d](#top) [e](../Cargo.toml) [f](..)",
            "```\n[g](nowhere.md)\n```\n",
        ] {
            assert_eq!(told(good), [""; 0], "{good}");
        }
        for bad in ["[a](nowhere.md)", "[a](there.md#other)", "x\n[a](#top)", "[a](../docs/../x.md)"] {
            assert_eq!(told(bad).len(), 1, "{bad}");
        }
    }

    #[test]
    fn commands_are_found_and_those_of_xtask_are_tried() {
        let text =
            "$ no\n```sh\n$ no\n```\n```console\n$ sudo casemate run a.toml --json | less\nprinted\n```\n";
        assert_eq!(
            commands(text),
            [(6, ["casemate", "run", "a.toml", "--json"].map(str::to_owned).to_vec())]
        );
        let of = |command: &str| told(&format!("```console\n$ cargo xtask {command}\n```\n")).len();
        assert_eq!((of("test --long"), of("demo --here --device 03:00.0"), of("--help")), (0, 0, 0));
        assert_eq!((of("fly"), of("test --longer"), of("")), (1, 1, 1));
    }
}
