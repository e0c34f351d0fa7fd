//! The walls between crates, compared with what Cargo says: edges, what each program links, and the tables in
//! `ARCHITECTURE.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

use super::{
    rooms::{BANS, Ban, LISTED_PROGRAM, PLUGIN_SDK, ROOMS, Room},
    tables,
};
use crate::steps::{cargo, workspace};

/// The workspaces of the house, by their manifests. `plugins` is apart: see [`plugin_edges`].
const WORKSPACES: &[&str] = &["Cargo.toml", "src/policy-compiler/Cargo.toml", "fuzz/Cargo.toml"];

/// A crate, and the crates beside it that it depends on, in whatever way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    uses: BTreeSet<String>,
}

/// A crate from outside, with its version.
type Dependency = (String, String);

/// What a program links, by the program's name: all crates, with whether they come from outside.
type Trees = BTreeMap<String, BTreeMap<Dependency, bool>>;

/// Everything that is wrong with the walls.
pub(crate) fn complaints(architecture: &str) -> Vec<String> {
    let mut complaints = order(ROOMS);
    let mut packages = Vec::new();
    for manifest in WORKSPACES {
        match metadata(manifest) {
            Ok(more) => packages.extend(more),
            Err(error) => return vec![error],
        }
    }
    complaints.extend(edges(&packages, ROOMS));
    complaints.extend(documented_edges(architecture, ROOMS));
    complaints
        .extend(metadata("plugins/Cargo.toml").map_or_else(|error| vec![error], |all| plugin_edges(&all)));
    match trees() {
        Ok(trees) => {
            complaints.extend(BANS.iter().flat_map(|ban| banned(&trees, ban)));
            complaints.extend(listed(&trees, architecture));
        }
        Err(error) => complaints.push(error),
    }
    complaints
}

/// Each crate must stand below those that it may use, so that there are no circles and the list can be read from above.
fn order(rooms: &[Room]) -> Vec<String> {
    let place = |name: &str| rooms.iter().position(|room| room.name == name);
    let mut complaints = Vec::new();
    for (at, room) in rooms.iter().enumerate() {
        for used in room.uses {
            if place(used).is_none_or(|above| above >= at) {
                complaints
                    .push(format!("rooms.rs: {} may use {used}, which does not stand above it", room.name));
            }
        }
    }
    complaints
}

fn edges(packages: &[Package], rooms: &[Room]) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages {
        let Some(room) = rooms.iter().find(|room| room.name == package.name) else {
            complaints.push(format!(
                "{}: a crate without a room; give it one in rooms.rs and ARCHITECTURE.md",
                package.name
            ));
            continue;
        };
        for used in &package.uses {
            if !room.uses.contains(&used.as_str()) {
                complaints.push(format!("{} uses {used}, and may not: see ARCHITECTURE.md", package.name));
            }
        }
        for allowed in room.uses.iter().filter(|allowed| !package.uses.contains(**allowed)) {
            complaints.push(format!(
                "{} may use {allowed}, and does not: close the door in rooms.rs",
                package.name
            ));
        }
    }
    for room in rooms.iter().filter(|room| packages.iter().all(|package| package.name != room.name)) {
        complaints.push(format!("rooms.rs: there is no crate {}", room.name));
    }
    complaints
}

fn documented_edges(architecture: &str, rooms: &[Room]) -> Vec<String> {
    let Some(rows) = tables::under(architecture, "Edges") else {
        return vec!["ARCHITECTURE.md: no table under \"Edges\"".to_owned()];
    };
    let told: Vec<(&str, BTreeSet<&str>)> = rows
        .iter()
        .filter_map(|row| {
            let name = tables::ticked(row.first()?).first().copied()?;
            Some((name, tables::ticked(row.get(1)?).into_iter().collect()))
        })
        .collect();
    let held: Vec<(&str, BTreeSet<&str>)> =
        rooms.iter().map(|room| (room.name, room.uses.iter().copied().collect())).collect();
    let pairs = told.iter().zip(&held).find(|(told, held)| told != held);
    match pairs {
        Some((told, held)) => vec![format!("ARCHITECTURE.md: Edges says {told:?}, rooms.rs {held:?}")],
        None if told.len() != held.len() => {
            vec![format!("ARCHITECTURE.md: Edges has {} rows, rooms.rs {}", told.len(), held.len())]
        }
        None => Vec::new(),
    }
}

/// A plugin sees the SDK and nothing else of the house.
fn plugin_edges(packages: &[Package]) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages {
        for used in package.uses.iter().filter(|used| *used != PLUGIN_SDK) {
            complaints
                .push(format!("plugin {} uses {used}; a plugin may use {PLUGIN_SDK} alone", package.name));
        }
    }
    complaints
}

fn banned(trees: &Trees, ban: &Ban) -> Vec<String> {
    let Some(tree) = trees.get(ban.program) else {
        return vec![format!("cargo tree does not show {}", ban.program)];
    };
    let is_banned = |name: &str| {
        ban.names.iter().any(|banned| match banned.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == *banned,
        })
    };
    let found = tree.keys().filter(|(name, _)| is_banned(name));
    found
        .map(|(name, version)| format!("{} links {name} {version}, and may not: {}", ban.program, ban.why))
        .collect()
}

/// The table of external crates must be the tree, no more and no less: a new one comes into the cell on purpose.
fn listed(trees: &Trees, architecture: &str) -> Vec<String> {
    let title = "Dependencies of the cell";
    let Some(rows) = tables::under(architecture, title) else {
        return vec![format!("ARCHITECTURE.md: no table under {title:?}")];
    };
    let told: BTreeSet<Dependency> = rows
        .iter()
        .filter_map(|row| {
            let name = tables::ticked(row.first()?).first().copied()?;
            Some((name.to_owned(), (*row.get(1)?).to_owned()))
        })
        .collect();
    let empty = BTreeMap::new();
    let tree = trees.get(LISTED_PROGRAM).unwrap_or(&empty);
    let linked: BTreeSet<Dependency> =
        tree.iter().filter(|(_, external)| **external).map(|(dependency, _)| dependency.clone()).collect();
    let missing = linked.difference(&told).map(|(name, version)| {
        format!("ARCHITECTURE.md: {name} {version} is in {LISTED_PROGRAM} and not in the table {title:?}: say why it is there")
    });
    let gone = told.difference(&linked).map(|(name, version)| {
        format!("ARCHITECTURE.md: {name} {version} is in the table {title:?} and not in {LISTED_PROGRAM}")
    });
    let unexplained = rows.iter().filter(|row| row.last().is_none_or(|why| why.is_empty()));
    let unexplained = unexplained.map(|row| format!("ARCHITECTURE.md: {title:?} has no reason for {row:?}"));
    missing.chain(gone).chain(unexplained).collect()
}

fn output(mut command: Command) -> Result<String, String> {
    let words = format!("{:?}", command.get_args().collect::<Vec<_>>());
    let output = command.output().map_err(|error| format!("cannot run cargo {words}: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo {words} failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn metadata(manifest: &str) -> Result<Vec<Package>, String> {
    let path = workspace().join(manifest).display().to_string();
    let ask = ["metadata", "--format-version", "1", "--manifest-path", &path];
    // With dependencies the lock file is read, and refused when it does not fit; for the edges they are only in the way.
    output(cargo(&[&ask[..], &["--locked"]].concat()))?;
    let text = output(cargo(&[&ask[..], &["--no-deps"]].concat()))?;
    parse_metadata(&text).ok_or_else(|| format!("cargo metadata of {manifest} cannot be read"))
}

fn parse_metadata(text: &str) -> Option<Vec<Package>> {
    let value: Value = serde_json::from_str(text).ok()?;
    let packages = value.get("packages")?.as_array()?.iter().map(|package| {
        let dependencies = package.get("dependencies")?.as_array()?;
        let beside =
            dependencies.iter().filter(|dependency| dependency.get("path").is_some_and(Value::is_string));
        let uses = beside.map(|dependency| Some(dependency.get("name")?.as_str()?.to_owned()));
        Some(Package { name: package.get("name")?.as_str()?.to_owned(), uses: uses.collect::<Option<_>>()? })
    });
    packages.collect()
}

/// What is linked when the whole workspace is built at once, as the programs are: Cargo then gives each crate the
/// features that anybody asks for.
fn trees() -> Result<Trees, String> {
    let arguments =
        ["tree", "--workspace", "--edges", "normal", "--prefix", "depth", "--no-dedupe", "--format", "{p}"];
    let mut command = cargo(&arguments);
    command.args(["--target", "x86_64-unknown-linux-gnu"]);
    Ok(parse_trees(&output(command)?))
}

/// Reads lines such as `0casemate-vmm v0.1.0 (/path)` and `1libc v0.2.1`.
fn parse_trees(text: &str) -> Trees {
    let mut trees = Trees::new();
    let mut program = String::new();
    for line in text.lines() {
        let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
        let depth = line.strip_suffix(rest);
        let mut words = rest.split(' ');
        let (Some(depth), Some(name), Some(version)) = (depth, words.next(), words.next()) else { continue };
        if depth == "0" {
            program = name.to_owned();
            trees.entry(program.clone()).or_default();
        } else if let Some(tree) = trees.get_mut(&program) {
            let external = !words.any(|word| word.starts_with("(/"));
            tree.insert((name.to_owned(), version.trim_start_matches('v').to_owned()), external);
        }
    }
    trees
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUSE: &[Room] = &[Room { name: "spec", uses: &[] }, Room { name: "keep", uses: &["spec"] }];

    fn package(name: &str, uses: &[&str]) -> Package {
        Package { name: name.into(), uses: uses.iter().map(|used| (*used).to_owned()).collect() }
    }

    #[test]
    fn the_house_as_planned_has_no_complaints() {
        assert_eq!(edges(&[package("spec", &[]), package("keep", &["spec"])], HOUSE), [""; 0]);
        assert_eq!(order(HOUSE), [""; 0]);
        assert_eq!(order(ROOMS), [""; 0]);
    }

    #[test]
    fn an_edge_that_is_not_allowed_or_not_used_is_told() {
        let found =
            |spec: &[&str], keep: &[&str]| edges(&[package("spec", spec), package("keep", keep)], HOUSE);
        assert!(found(&["keep"], &["spec"])[0].contains("spec uses keep, and may not"));
        assert!(found(&[], &[])[0].contains("keep may use spec, and does not"));
        assert!(edges(&[package("spec", &[])], HOUSE)[0].contains("no crate keep"));
        let stranger =
            edges(&[package("spec", &[]), package("keep", &["spec"]), package("attic", &[])], HOUSE);
        assert!(stranger[0].contains("without a room"));
    }

    #[test]
    fn a_list_that_points_down_is_told() {
        let circle = [Room { name: "a", uses: &["b"] }, Room { name: "b", uses: &["b"] }];
        assert_eq!(order(&circle).len(), 2);
    }

    #[test]
    fn plugins_see_their_sdk_alone() {
        assert_eq!(plugin_edges(&[package("limits", &[PLUGIN_SDK])]), [""; 0]);
        assert_eq!(plugin_edges(&[package("limits", &["casemate-host"])]).len(), 1);
    }

    #[test]
    fn the_table_of_edges_must_be_the_list() {
        let table = |rows: &str| format!("## Edges\n| crate | may use |\n|---|---|\n{rows}");
        let good = table("| `spec` | nothing |\n| `keep` | `spec` |\n");
        assert_eq!(documented_edges(&good, HOUSE), [""; 0]);
        for bad in ["| `spec` | |\n", "| `spec` | |\n| `keep` | |\n", "| `keep` | `spec` |\n| `spec` | |\n"] {
            assert_eq!(documented_edges(&table(bad), HOUSE).len(), 1, "{bad}");
        }
        assert_eq!(documented_edges("## Rooms\n", HOUSE).len(), 1);
    }

    const TREE: &str = "0casemate-vmm v0.1.0 (/x/src/vmm)\n1casemate-wire v0.1.0 (/x/src/wire)\n2serde v1.0.2\n\
                        3serde_derive v1.0.2 (proc-macro)\n1libc v0.2.1\n\n0casemate v0.1.0 (/x/src/cli)\n1wasmtime v48.0.8\n";

    #[test]
    fn what_may_not_be_linked_is_told() {
        let trees = parse_trees(TREE);
        assert_eq!(trees["casemate-vmm"].len(), 4);
        let ban = |names: &'static [&'static str]| Ban { program: "casemate-vmm", names, why: "because" };
        assert_eq!(banned(&trees, &ban(&["wasmtime", "serd"])), [""; 0]);
        assert_eq!(banned(&trees, &ban(&["libc"])).len(), 1);
        assert_eq!(banned(&trees, &ban(&["casemate-wire"])).len(), 1, "deep or near, ours or not");
        assert_eq!(banned(&trees, &ban(&["serde*"])).len(), 2);
        let unknown = Ban { program: "casemate-attic", ..ban(&["libc"]) };
        assert_eq!(banned(&trees, &unknown).len(), 1);
    }

    #[test]
    fn every_ban_would_be_seen() {
        for ban in BANS {
            for name in ban.names {
                let name = name.trim_end_matches('*');
                let tree = format!("0{} v0.1.0 (/x)\n1other v1.0.0\n2{name} v1.0.0\n", ban.program);
                assert_eq!(banned(&parse_trees(&tree), ban).len(), 1, "{name}");
            }
        }
    }

    #[test]
    fn the_table_of_dependencies_must_be_the_tree() {
        let table = |rows: &str| {
            format!("### Dependencies of the cell\n| crate | version | why |\n|---|---|---|\n{rows}")
        };
        let trees = parse_trees(TREE);
        let good = "| `libc` | 0.2.1 | calls |\n| `serde` | 1.0.2 | messages |\n| `serde_derive` | 1.0.2 | messages |\n";
        assert_eq!(listed(&trees, &table(good)), [""; 0]);
        for (from, to) in [
            ("| `libc` | 0.2.1 | calls |\n", ""),
            ("0.2.1", "0.2.2"),
            ("| calls |", "| |"),
            ("| `libc`", "| `tokio` | 1.0.0 | why not |\n| `libc`"),
        ] {
            assert_ne!(listed(&trees, &table(&good.replacen(from, to, 1))), [""; 0], "{from} to {to}");
        }
    }

    #[test]
    fn metadata_is_read() {
        let text = r#"{"packages":[{"name":"a","dependencies":[{"name":"b","path":"/b","kind":"dev"},{"name":"c","path":null}]}]}"#;
        assert_eq!(parse_metadata(text), Some(vec![package("a", &["b"])]));
        assert_eq!(parse_metadata("{}"), None);
    }
}
