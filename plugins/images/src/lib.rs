//! Policy `images`: what may boot. Kernels, initrds and read-only disks by digest, files by folder, and the words of the
//! kernel's command line.

use casemate_plugin_sdk::{
    Change, File, Policy, Reason, Request, Severity, Value, Verdict, attr, export_policy, verdict,
};
use serde::{Deserialize, Deserializer, de::Error};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// Kernels that may boot.
    kernels: Option<Vec<Digest>>,
    /// Initrds that may be loaded; a guest without one is fine.
    initrds: Option<Vec<Digest>>,
    /// Disks that a guest may have read-only. Disks that it may write to have no digest: `folders` is for them.
    disks: Option<Vec<Digest>>,
    /// Who may sign: what is signed by one of these needs to be in no list, and what isn't has to be in one.
    signers: Option<Vec<String>>,
    /// Folders below which all files of a guest have to lie; `{tenant}` stands for the tenant's name.
    folders: Option<Vec<String>>,
    /// Words that the command line must not have: `init=*`; a `*` at the end stands for anything.
    forbidden_words: Vec<String>,
    /// Words that it must have.
    required_words: Vec<String>,
    /// Add required words that are missing, where the bundle lets this plugin change `boot.command_line`.
    add_words: bool,
}

/// 64 lower-case hexadecimal digits.
#[derive(PartialEq)]
struct Digest(String);

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let good = text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !good {
            return Err(D::Error::custom(format!("{text:?} is not a sha256, as sha256sum prints it")));
        }
        Ok(Self(text))
    }
}

struct Images;

impl Policy for Images {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] =
        &["kernel", "initrd", "disk", "folder", "forbidden-word", "missing-word"];
    const CHANGES: &'static [&'static str] = &["boot.command_line"];
    const NEEDS: &'static [&'static str] = &["kernel-sha256", "initrd-sha256", "disk-sha256"];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        for folder in settings.folders.iter().flatten() {
            if !folder.starts_with('/') || !folder.ends_with('/') || folder.contains("/../") {
                reasons.push(
                    Reason::new("no-folder", format!("{folder:?} is not a folder"))
                        .field("settings.folders")
                        .remedy("write it from / to /: \"/srv/{tenant}/\""),
                );
            }
        }
        let words = settings.forbidden_words.iter().chain(&settings.required_words);
        for word in words.filter(|word| word.is_empty() || word.contains(char::is_whitespace)) {
            reasons.push(
                Reason::new("no-word", format!("{word:?} is not a word"))
                    .field("settings")
                    .remedy("write words of the command line one by one"),
            );
        }
        let contradiction =
            settings.required_words.iter().find(|word| is_forbidden(settings, word).is_some());
        if let Some(word) = contradiction {
            reasons.push(
                Reason::new("no-guest-fits", format!("{word:?} is required and forbidden"))
                    .field("settings.required_words")
                    .remedy("remove it from one of the lists"),
            );
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn admit(settings: Settings, request: Request) -> Verdict {
        let guest = &request.guest;
        let mut reasons = Vec::new();
        let signers = settings.signers.as_deref();
        let known = |code: &str, field: &str, file: &File, digests: &Option<Vec<Digest>>| {
            known(code, field, file, &Allowed { digests: digests.as_deref(), signers })
        };
        reasons.extend(known("kernel", "boot.kernel", &guest.kernel, &settings.kernels));
        if let Some(initrd) = &guest.initrd {
            reasons.extend(known("initrd", "boot.initrd", initrd, &settings.initrds));
        }
        for (slot, disk) in guest.disks.iter().enumerate().filter(|(_, disk)| disk.read_only) {
            let file = File {
                path: disk.path.clone(),
                size_bytes: disk.size_bytes,
                sha256: disk.sha256.clone(),
                attrs: disk.attrs.clone(),
            };
            reasons.extend(known("disk", &format!("disk[{slot}].path"), &file, &settings.disks));
        }
        reasons.extend(outside(&settings, &request));
        let (words, missing) = words(&settings, &guest.command_line);
        reasons.extend(words);
        let changes = if missing.is_empty() {
            Vec::new()
        } else {
            let mut line = guest.command_line.clone();
            for word in &missing {
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(word);
            }
            let why = format!("every guest boots with {}", missing.join(" "));
            vec![Change::new("boot.command_line", Value::Text(line), why)]
        };
        verdict(reasons, Vec::new()).with_changes(changes)
    }
}

export_policy!(Images);

/// What of a kind is allowed.
struct Allowed<'a> {
    digests: Option<&'a [Digest]>,
    signers: Option<&'a [String]>,
}

fn known(code: &str, field: &str, file: &File, allowed: &Allowed<'_>) -> Option<Reason> {
    let Allowed { digests, signers } = *allowed;
    let signer = attr(&file.attrs, "signer");
    let listed = file
        .sha256
        .as_ref()
        .is_some_and(|digest| digests.iter().copied().flatten().any(|one| one.0 == *digest));
    let signed = signer.is_some_and(|signer| signers.iter().copied().flatten().any(|one| one == signer));
    if listed || signed || (digests.is_none() && signers.is_none()) {
        return None;
    }
    let what = match &file.sha256 {
        None => format!("nobody knows the digest of {}", file.path),
        Some(digest) => format!("{} (sha256 {digest})", file.path),
    };
    let mut message = what;
    if let (Some(digests), Some(_)) = (digests, &file.sha256) {
        message.push_str(&format!(" is none of the {} that are allowed", digests.len()));
    }
    if let Some(signers) = signers {
        let by = signer.map_or("by nobody that this host knows".to_owned(), |signer| format!("by {signer}"));
        let and = if digests.is_some() { ", and" } else { "" };
        message.push_str(&format!("{and} is signed {by}, and not by {}", signers.join(" or ")));
    }
    let remedy = match signers {
        None => "choose one that is allowed, or have an operator add this one's digest",
        Some(_) => "choose one that is allowed, or put its signature beside it: FILE.minisig",
    };
    Some(Reason::new(code, message).field(field).severity(Severity::High).remedy(remedy))
}

fn outside(settings: &Settings, request: &Request) -> Vec<Reason> {
    let Some(folders) = &settings.folders else { return Vec::new() };
    let folders: Vec<_> = folders.iter().map(|f| f.replace("{tenant}", &request.tenant.name)).collect();
    let guest = &request.guest;
    let kernel = std::iter::once(("boot.kernel".to_owned(), &guest.kernel.path));
    let initrd = guest.initrd.iter().map(|initrd| ("boot.initrd".to_owned(), &initrd.path));
    let disks = guest.disks.iter().enumerate().map(|(slot, disk)| (format!("disk[{slot}].path"), &disk.path));
    let inside = |path: &str| {
        // The host passes paths without "..": one that has it is not trusted to lie where it seems to.
        !path.split('/').any(|part| part == "..") && folders.iter().any(|folder| path.starts_with(folder))
    };
    kernel
        .chain(initrd)
        .chain(disks)
        .filter(|(_, path)| !inside(path))
        .map(|(field, path)| {
            Reason::new("folder", format!("{path} does not lie in {}", folders.join(" or ")))
                .field(field)
                .severity(Severity::High)
                .remedy("put it there, or have an operator allow its folder")
        })
        .collect()
}

fn is_forbidden<'a>(settings: &'a Settings, word: &str) -> Option<&'a str> {
    // To Linux, - and _ are the same in a name, and a quote before a word is not part of it (kernel/params.c).
    let same = |text: &str| text.trim_matches('"').replace('-', "_");
    let word = same(word);
    let matches = |pattern: &&String| match pattern.strip_suffix('*') {
        Some(start) => word.starts_with(&same(start)),
        None => word == same(pattern),
    };
    settings.forbidden_words.iter().find(matches).map(String::as_str)
}

/// What is wrong with the command line, and which words would be added.
fn words<'a>(settings: &'a Settings, line: &str) -> (Vec<Reason>, Vec<&'a str>) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = |reason: Reason| reason.field("boot.command_line");
    let mut reasons: Vec<_> = words
        .iter()
        .filter_map(|word| {
            let pattern = is_forbidden(settings, word)?;
            let message = format!("{word} is forbidden on the command line ({pattern})");
            Some(at(Reason::new("forbidden-word", message).severity(Severity::High).remedy("remove it")))
        })
        .collect();
    let missing: Vec<&str> =
        settings.required_words.iter().map(String::as_str).filter(|word| !words.contains(word)).collect();
    if settings.add_words {
        return (reasons, missing);
    }
    reasons.extend(missing.iter().map(|word| {
        at(Reason::new("missing-word", format!("{word} has to be on the command line"))
            .remedy(format!("add {word}")))
    }));
    (reasons, Vec::new())
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Denied, Disk, testing::request};

    use super::*;

    const GOOD: &str = "a8c0a221501197f2f021eb1f6954748513bf344f8ae939e43b729d364869325c";

    fn settings(json: &str) -> Settings {
        serde_json::from_str(json).unwrap()
    }

    fn codes(json: &str, request: Request) -> Vec<String> {
        match Images::admit(settings(json), request) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => {
                reasons.into_iter().map(|r| format!("{} {}", r.code, r.field.unwrap())).collect()
            }
        }
    }

    #[test]
    fn files_are_known_by_digest_and_without_one_by_nobody() {
        let only = |what: &str| format!(r#"{{"{what}": ["{GOOD}"]}}"#);
        let mut request = request();
        request.guest.initrd = Some(casemate_plugin_sdk::testing::file("/boot/initrd"));
        let template: Disk = request.guest.disks[0].clone();
        request.guest.disks.push(Disk { read_only: true, ..template });
        assert_eq!(codes(&only("kernels"), request.clone()), ["kernel boot.kernel"]);
        assert_eq!(codes(&only("initrds"), request.clone()), ["initrd boot.initrd"]);
        assert_eq!(codes(&only("disks"), request.clone()), ["disk disk[1].path"]);
        request.guest.kernel.sha256 = Some(GOOD.into());
        request.guest.initrd.as_mut().unwrap().sha256 = Some(GOOD.into());
        request.guest.disks[1].sha256 = Some(GOOD.into());
        for what in ["kernels", "initrds", "disks"] {
            assert_eq!(codes(&only(what), request.clone()), [""; 0], "{what}");
        }
        request.guest.kernel.sha256 = Some("0".repeat(64));
        assert_eq!(codes(&only("kernels"), request.clone()), ["kernel boot.kernel"]);
        assert_eq!(codes(r#"{"kernels": []}"#, request), ["kernel boot.kernel"]);
    }

    #[test]
    fn a_signature_stands_for_a_place_in_a_list() {
        let json = r#"{"signers": ["release", "security"]}"#;
        assert_eq!(codes(json, request()), ["kernel boot.kernel"], "nobody signed it");
        let mut signed = request();
        signed.guest.kernel.attrs = vec![("signer".into(), "security".into())];
        assert_eq!(codes(json, signed.clone()), [""; 0]);
        assert_eq!(codes(&format!(r#"{{"kernels": ["{GOOD}"]}}"#), signed.clone()), ["kernel boot.kernel"]);
        signed.guest.kernel.attrs = vec![("signer".into(), "intern".into())];
        assert_eq!(codes(json, signed.clone()), ["kernel boot.kernel"]);
        signed.guest.kernel.sha256 = Some(GOOD.into());
        let both = format!(r#"{{"kernels": ["{GOOD}"], "signers": ["release"]}}"#);
        assert_eq!(codes(&both, signed), [""; 0], "it's in the list");
    }

    #[test]
    fn folders_hold_for_every_file_and_are_the_tenants_own() {
        let json = r#"{"folders": ["/boot/", "/srv/{tenant}/"]}"#;
        assert_eq!(codes(json, request()), [""; 0]);
        for path in ["/srv/acmes/web.img", "/srv/rival/web.img", "/srv/acme/../rival/web.img", "srv/acme/x"] {
            let mut request = request();
            request.guest.disks[0].path = path.into();
            assert_eq!(codes(json, request), ["folder disk[0].path"], "{path}");
        }
    }

    #[test]
    fn words_are_forbidden_whole_or_by_their_start() {
        let json = r#"{"forbidden_words": ["init=*", "single", "no_kaslr"]}"#;
        for (line, bad) in [
            ("console=ttyS0", false),
            ("init=/bin/sh", true),
            ("quiet\tsingle", true),
            ("\"init=/bin/sh -c\"", true),
            ("singles rdinit=/x", false),
            ("no-kaslr", true),
        ] {
            let mut request = request();
            request.guest.command_line = line.into();
            assert_eq!(!codes(json, request).is_empty(), bad, "{line}");
        }
    }

    #[test]
    fn words_that_are_missing_are_refused_or_added() {
        let refuse = r#"{"required_words": ["console=ttyS0", "quiet"]}"#;
        assert_eq!(codes(refuse, request()), ["missing-word boot.command_line"]);
        let add = r#"{"required_words": ["quiet", "panic=1"], "add_words": true}"#;
        let Verdict::Allow(allowed) = Images::admit(settings(add), request()) else { panic!("denied") };
        let [change] = &allowed.changes[..] else { panic!("one change") };
        let Value::Text(line) = &change.value else { panic!("a text") };
        assert_eq!(line, "console=ttyS0 quiet panic=1");
        let mut changed = request();
        changed.guest.command_line.clone_from(line);
        let Verdict::Allow(allowed) = Images::admit(settings(add), changed) else { panic!("denied") };
        assert_eq!(allowed.changes, [], "content with what it asked for");
    }

    #[test]
    fn refuses_settings_that_mean_nothing() {
        for json in [
            r#"{"folders": ["srv/"]}"#,
            r#"{"folders": ["/srv"]}"#,
            r#"{"forbidden_words": ["a b"]}"#,
            r#"{"forbidden_words": ["qu*"], "required_words": ["quiet"]}"#,
        ] {
            assert_eq!(Images::check(&settings(json)).unwrap_err().len(), 1, "{json}");
        }
        for json in [r#"{"kernels": ["abc"]}"#, r#"{"kernel": []}"#] {
            assert!(serde_json::from_str::<Settings>(json).is_err(), "{json}");
        }
    }
}
