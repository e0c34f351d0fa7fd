use super::*;
use casemate_plugin_sdk::{Denied, testing::request};

fn settings(json: &str) -> Settings {
    serde_json::from_str(json).unwrap()
}

/// Codes and fields of the reasons, or none when it's allowed.
fn reasons(json: &str, request: Request) -> Vec<(String, String)> {
    match Limits::admit(settings(json), request) {
        Verdict::Allow(_) => vec![],
        Verdict::Deny(Denied { reasons, .. }) => {
            reasons.into_iter().map(|reason| (reason.code, reason.field.unwrap())).collect()
        }
    }
}

fn one(code: &str, field: &str) -> Vec<(String, String)> {
    vec![(code.into(), field.into())]
}

#[test]
fn without_settings_nothing_is_limited() {
    assert_eq!(reasons("{}", request()), []);
}

#[test]
fn each_limit_holds_from_just_above_it() {
    assert_eq!(reasons(r#"{"max_memory": "8 GiB"}"#, request()), []);
    assert_eq!(reasons(r#"{"max_memory": "8191 MiB"}"#, request()), one("memory", "memory"));
    assert_eq!(reasons(r#"{"keep_free": "4 GiB"}"#, request()), []);
    assert_eq!(reasons(r#"{"keep_free": "4097 MiB"}"#, request()), one("host-memory", "memory"));
    assert_eq!(reasons(r#"{"max_vcpus": 2}"#, request()), []);
    assert_eq!(reasons(r#"{"max_vcpus": 1}"#, request()), one("vcpus", "vcpus"));
    assert_eq!(reasons(r#"{"max_devices": 1}"#, request()), []);
    assert_eq!(reasons(r#"{"max_devices": 0}"#, request()), one("devices", "device[0].address"));
}

#[test]
fn devices_are_chosen_as_lspci_does() {
    for kind in ["8086:100e", "8086:", ":100e", "8086:*", "::02", "::0200", "8086::020000", ":", "8086:100E"]
    {
        assert_eq!(reasons(&format!(r#"{{"devices": ["dead:beef", "{kind}"]}}"#), request()), [], "{kind}");
    }
    for kind in ["8086:100f", "1af4:", "::0108", "::020001", "8086:100e:03"] {
        let refused = reasons(&format!(r#"{{"devices": ["{kind}"]}}"#), request());
        assert_eq!(refused, one("device-kind", "device[0].address"), "{kind}");
    }
    assert_eq!(reasons(r#"{"devices": []}"#, request()), one("device-kind", "device[0].address"));
}

#[test]
fn refuses_patterns_that_are_none() {
    for text in ["", "8086", "8086:1", "808g:100e", "8086:100e:123", "8086:100e:02:", "+086:100e"] {
        assert_eq!(Pattern::parse(text), None, "{text}");
    }
}

#[test]
fn tells_all_that_is_wrong() {
    let all =
        reasons(r#"{"max_memory": "1 GiB", "max_vcpus": 1, "max_devices": 0, "devices": []}"#, request());
    assert_eq!(all.len(), 4);
}

#[test]
fn an_update_needs_only_what_is_new() {
    let mut update = request();
    update.operation = Operation::Update;
    update.old = Some(request().guest);
    update.host.memory_free_bytes = 1 << 30;
    assert_eq!(reasons(r#"{"keep_free": "1 GiB"}"#, update.clone()), []);
    update.guest.memory_bytes += 2 << 20;
    assert_eq!(reasons(r#"{"keep_free": "1 GiB"}"#, update), one("host-memory", "memory"));
}

#[test]
fn each_disk_is_held_to_the_same_size() {
    let mut grown = request();
    grown.guest.disks[0].size_bytes = 10 << 30;
    assert_eq!(reasons(r#"{"max_disk": "10 GiB"}"#, grown.clone()), []);
    grown.operation = Operation::Update;
    grown.old = Some(request().guest);
    grown.guest.disks[0].size_bytes += 1;
    assert_eq!(reasons(r#"{"max_disk": "10 GiB"}"#, grown), one("disk", "disk[0].path"));
}

#[test]
fn the_message_has_both_numbers_and_what_to_do() {
    let Verdict::Deny(denied) = Limits::admit(settings(r#"{"max_memory": "4 GiB"}"#), request()) else {
        panic!("allowed")
    };
    let reason = &denied.reasons[0];
    assert_eq!(reason.message, "8 GiB is more than the 4 GiB that one guest may have");
    assert_eq!(reason.remedy.as_deref(), Some("ask for at most 4 GiB"));
}

#[test]
fn warns_of_more_vcpus_than_processors() {
    let mut many = request();
    many.guest.vcpus = 5;
    let Verdict::Allow(allowed) = Limits::admit(Settings::default(), many) else { panic!("denied") };
    assert_eq!(allowed.warnings[0].code, "overcommitted");
}

#[test]
fn refuses_settings_that_no_guest_meets_and_unknown_ones() {
    assert!(Limits::check(&settings(r#"{"max_vcpus": 0}"#)).is_err());
    assert!(Limits::check(&settings(r#"{"max_memory": "0"}"#)).is_err());
    for json in
        [r#"{"max_ram": 1}"#, r#"{"max_memory": 1}"#, r#"{"max_memory": "1 GB"}"#, r#"{"devices": ["x"]}"#]
    {
        assert!(serde_json::from_str::<Settings>(json).is_err(), "{json}");
    }
}
