//! Every code of a refusal is in `docs/refusals.md`, and every code there is in the code.

use std::collections::BTreeSet;

use super::File;

/// Where the list is.
pub(crate) const LIST: &str = "docs/refusals.md";

/// Words that look like codes and are none: drivers, checks of `casemate doctor`, threads, kinds of descriptors, deeds of governors.
const NO_CODES: &[&str] = &[
    "device-taken",
    "disk-limit",
    "disk-sha256",
    "group-mates",
    "guest-ram",
    "host-address",
    "initrd-sha256",
    "kernel-sha256",
    "kvm-backend",
    "kvm-vcpu",
    "kvm-vfio",
    "kvm-vm",
    "policy-ticker",
    "rom-sha256",
    "vfio-container",
    "vfio-device",
    "vfio-group",
    "vfio-noiommu",
    "vfio-pci",
];

/// Codes in the list that are not in the code, and the other way round.
///
/// A code is what stands first in `Refusal::new(...)`, and any other word of that shape whose first part is that of a
/// code in the list: codes also come out of tables and helper functions.
pub(super) fn complaints(files: &[File<'_>]) -> Vec<String> {
    let Some(list) = files.iter().find(|file| file.path.as_os_str() == LIST) else {
        return vec![format!("{LIST} is missing")];
    };
    let listed = listed(list.text);
    let families: BTreeSet<&str> = listed.iter().filter_map(|code| code.split('-').next()).collect();
    let mut used = BTreeSet::new();
    for file in files.iter().filter(|file| is_product(file)) {
        let text = without_tests(file.text);
        used.extend(refused(text));
        used.extend(words(text).filter(|word| {
            word.split('-').next().is_some_and(|family| families.contains(family)) && !NO_CODES.contains(word)
        }));
    }
    let unlisted = used
        .difference(&listed)
        .map(|code| format!("{LIST}: `{code}` is a code of a refusal, and not listed"));
    let unused = listed
        .difference(&used)
        .map(|code| format!("{LIST}: `{code}` is listed, and nothing refuses with it"));
    unlisted.chain(unused).collect()
}

/// Rust of the programs, without files of tests.
fn is_product(file: &File<'_>) -> bool {
    let path = file.path;
    let of_product = path.starts_with("src") || path.starts_with("jail/src");
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let of_tests = name.ends_with("tests.rs")
        || name == "fixture.rs"
        || path.components().any(|part| part.as_os_str() == "tests");
    of_product && name.ends_with(".rs") && !of_tests
}

/// The text before its module of tests.
fn without_tests(text: &str) -> &str {
    text.split_once("mod tests {").map_or(text, |(before, _)| before)
}

/// The first cells of all tables of the list.
fn listed(text: &str) -> BTreeSet<&str> {
    let first = text.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
    first.flat_map(super::tables::ticked).filter(|code| is_code(code)).collect()
}

fn is_code(word: &str) -> bool {
    let parts = word.split('-');
    parts.clone().count() > 1
        && parts.clone().all(|part| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        })
}

/// What stands first in each `Refusal::new(...)`.
fn refused(text: &str) -> impl Iterator<Item = &str> {
    text.split("Refusal::new(")
        .skip(1)
        .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
}

/// All words between quotes that have a code's shape.
fn words(text: &str) -> impl Iterator<Item = &str> {
    // Comments hold no codes, and may hold single quotes and backslashes of all kinds; what is between two quotes of
    // different strings has spaces or commas in it, and so is not taken for a code.
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(|line| line.split('"')).filter(|word| is_code(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const CODE: &str = "// \"disk-ghost\"\nlet a = Refusal::new(\n    \"disk-empty\", x, y, z);\n    let (b, c) = (\"disk-size\", \"vfio-pci\");\n#[cfg(test)]\nmod tests {\n \"disk-none\" }\n";

    fn found(list: &str, code: &str) -> Vec<String> {
        complaints(&[
            File { path: Path::new(LIST), text: list },
            File { path: Path::new("src/host/src/image.rs"), text: code },
            File { path: Path::new("src/host/src/fixture.rs"), text: "\"disk-fixture\"" },
        ])
    }

    #[test]
    fn both_sides_must_agree() {
        let list = "| code | what |\n|---|---|\n| `disk-empty` | `disk-nothing` |\n| `disk-size` | x |\n";
        assert_eq!(found(list, CODE), [""; 0]);
        let [only] = &found(&list.replace("| `disk-size` | x |\n", ""), CODE)[..] else { panic!() };
        assert!(only.contains("`disk-size` is a code of a refusal, and not listed"));
        let [only] = &found(list, &CODE.replace("disk-empty", "disk-size"))[..] else { panic!() };
        assert!(only.contains("`disk-empty` is listed, and nothing refuses with it"));
    }

    #[test]
    fn a_code_of_a_new_family_is_seen_where_it_is_refused_with() {
        let code = CODE.replace("disk-empty", "moon-full");
        assert!(found("| `disk-size` | x |\n", &code).iter().any(|told| told.contains("moon-full")));
        assert!(complaints(&[]).iter().any(|told| told.contains("missing")));
    }
}
