//! `casemate policy new`: a plugin that builds and passes its cases at once, with all that it needs beside it.

use std::{fs, io, path::Path, process::ExitCode};

use casemate_spec::Refusal;

use crate::output::{self, Failure};

macro_rules! plugins {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/", $path))
    };
}
macro_rules! own {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/template/", $path))
    };
}

/// Path and text, as they stand in Casemate's own source.
const FILES: &[(&str, &str)] = &[
    ("policies/wit/types.wit", include_str!("../../../../policies/wit/types.wit")),
    ("policies/wit/admission.wit", include_str!("../../../../policies/wit/admission.wit")),
    ("policies/wit/resources.wit", include_str!("../../../../policies/wit/resources.wit")),
    ("policies/wit/device.wit", include_str!("../../../../policies/wit/device.wit")),
    ("plugins/build", plugins!("build")),
    ("plugins/sdk/Cargo.toml", plugins!("sdk/Cargo.toml")),
    ("plugins/sdk/src/lib.rs", plugins!("sdk/src/lib.rs")),
    ("plugins/sdk/src/attrs.rs", plugins!("sdk/src/attrs.rs")),
    ("plugins/sdk/src/bytes.rs", plugins!("sdk/src/bytes.rs")),
    ("plugins/sdk/src/governor.rs", plugins!("sdk/src/governor.rs")),
    ("plugins/sdk/src/pattern.rs", plugins!("sdk/src/pattern.rs")),
    ("plugins/sdk/src/reason.rs", plugins!("sdk/src/reason.rs")),
    ("plugins/sdk/src/release.rs", plugins!("sdk/src/release.rs")),
    ("plugins/sdk/src/settings.rs", plugins!("sdk/src/settings.rs")),
    ("plugins/sdk/src/testing.rs", plugins!("sdk/src/testing.rs")),
];

/// What every plugin has; `@name@` becomes its name, `@what@` what it is, `@settings@` some of its settings.
const OWN_FILES: &[(&str, &str)] = &[
    ("README.md", own!("README.md")),
    ("plugins/Cargo.toml", own!("workspace.toml")),
    ("plugins/@name@/Cargo.toml", own!("plugin.toml")),
];

/// What a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// It admits guests.
    Admission,
    /// It looks after guests that run.
    Resources,
    /// It judges devices that come back.
    Device,
}

impl Kind {
    /// The plugin itself.
    const fn files(self) -> [(&'static str, &'static str); 3] {
        match self {
            Self::Admission => [
                ("plugins/@name@/src/lib.rs", own!("plugin.rs")),
                ("plugins/@name@/cases.toml", own!("cases.toml")),
                ("plugins/@name@/request.json", include_str!("../../../policy/examples/request.json")),
            ],
            Self::Resources => [
                ("plugins/@name@/src/lib.rs", own!("resources/plugin.rs")),
                ("plugins/@name@/cases.toml", own!("resources/cases.toml")),
                ("plugins/@name@/samples.json", include_str!("../../../policy/examples/samples.json")),
            ],
            Self::Device => [
                ("plugins/@name@/src/lib.rs", own!("device/plugin.rs")),
                ("plugins/@name@/cases.toml", own!("device/cases.toml")),
                ("plugins/@name@/device.json", include_str!("../../../policy/examples/device.json")),
            ],
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::Admission => "Policy: how long guests' names may be.",
            Self::Resources => "Governor: busy guests yield.",
            Self::Device => "Policy: drives go back only with checks passed.",
        }
    }

    const fn settings(self) -> &'static str {
        match self {
            Self::Admission => "settings = { longest = 8 }",
            Self::Resources => "settings = { most = 1.0 }\n    may_do = [\"cpu-weight\"]",
            Self::Device => "settings = { wants = [\"scrub\"] }",
        }
    }
}

pub(crate) fn write(name: &str, kind: Kind) -> Result<ExitCode, Failure> {
    let good = (1..=32).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !["sdk", "tests", "target", "built"].contains(&name);
    if !good {
        let cause = "this is not a plugin's name, or one that is taken";
        let remedy = "use 1 to 32 of a-z, 0-9 and -, beginning with a letter";
        return Err(Refusal::new("bad-name", name, cause, remedy).into());
    }
    let folder = Path::new(name);
    write_all(folder, name, kind).map_err(|error| {
        let remedy = "choose another name, or a folder where you may write";
        Refusal::new("policy-new", folder.display(), error, remedy)
    })?;
    output::line(&format!("wrote {name}; {name}/README.md says how to build and test it"));
    Ok(ExitCode::SUCCESS)
}

fn write_all(folder: &Path, name: &str, kind: Kind) -> io::Result<()> {
    // Nothing of somebody's is written over.
    fs::create_dir(folder)?;
    let texts = FILES.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned()));
    let fill = |text: &str| {
        text.replace("@name@", name).replace("@what@", kind.what()).replace("@settings@", kind.settings())
    };
    let own = OWN_FILES.iter().copied().chain(kind.files()).map(|(path, text)| (fill(path), fill(text)));
    for (path, text) in texts.chain(own) {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, text)?;
        if path.ends_with("plugins/build") {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_template_is_left_in_what_is_written() {
        for kind in [Kind::Admission, Kind::Resources, Kind::Device] {
            let folder =
                std::env::temp_dir().join(format!("casemate-template-{kind:?}-{}", std::process::id()));
            write_all(&folder, "my-rule", kind).unwrap();
            let read = |path: &str| fs::read_to_string(folder.join(path)).unwrap();
            let own = OWN_FILES.iter().copied().chain(kind.files());
            let texts: Vec<_> = own.map(|(path, _)| read(&path.replace("@name@", "my-rule"))).collect();
            assert!(texts.iter().all(|text| !text.contains('@')), "{texts:?}");
            assert!(read("plugins/Cargo.toml").contains("members = [\"sdk\", \"my-rule\"]"));
            assert!(write_all(&folder, "my-rule", kind).is_err(), "it would write over it");
            fs::remove_dir_all(&folder).unwrap();
        }
    }

    #[test]
    fn all_of_the_sdk_is_written() {
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/sdk/src");
        for file in fs::read_dir(sdk).unwrap() {
            let name = format!("plugins/sdk/src/{}", file.unwrap().file_name().display());
            assert!(FILES.iter().any(|(path, _)| *path == name), "{name}");
        }
    }

    #[test]
    fn the_templates_workspace_is_the_shipped_ones() {
        // The same versions and settings, so that the SDK builds as it does here.
        let (own, shipped) = (own!("workspace.toml"), plugins!("Cargo.toml"));
        let from = |text: &str, start: &str| text.split_once(start).map(|(_, rest)| rest.to_owned());
        assert_eq!(from(own, "[workspace.package]"), from(shipped, "[workspace.package]"));
    }

    #[test]
    fn refuses_names_that_are_none() {
        for name in ["", "Rule", "1rule", "rule-", "../rule", "sdk", &"x".repeat(33)] {
            assert!(write(name, Kind::Admission).is_err(), "{name}");
        }
    }
}
