//! The table `[platform]`: who the guest's machine says that it is, and whether it has a clock chip.

use serde::Deserialize;
use toml::Spanned;

use crate::{
    Refusal,
    device::is_serial,
    guest::{Reader, short},
};

/// They are told in a table of the guest's below 1 MiB, and in one message to its cell.
const OEM_STRINGS_MAX: usize = 8;
const OEM_STRING_BYTES_MAX: usize = 1024;

/// What a guest's machine tells of itself beside its devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// Its UUID, in the order in which it's written (RFC 9562, 4); none when its keep is to make one.
    pub uuid: Option<[u8; 16]>,
    /// Its serial number: 1 to 64 printable ASCII characters.
    pub serial: Option<String>,
    /// At most 8, each of 1 to 1024 printable ASCII characters.
    pub oem_strings: Vec<String>,
    /// Whether it has a clock chip.
    pub rtc: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawPlatform {
    uuid: Option<Spanned<String>>,
    serial: Option<Spanned<String>>,
    #[serde(default)]
    oem_strings: Vec<Spanned<String>>,
    #[serde(default)]
    rtc: bool,
}

impl Reader<'_> {
    pub(crate) fn platform(&mut self, raw: RawPlatform) -> Result<Platform, Refusal> {
        let refuse = |location, cause: String, remedy: &str| {
            Err(Refusal::new("bad-platform", "", cause, remedy).at(Some(location)))
        };
        let mut platform = Platform { rtc: raw.rtc, ..Platform::default() };
        if let Some(raw) = raw.uuid {
            let location = self.note(&raw);
            platform.uuid = uuid(raw.get_ref());
            if platform.uuid.is_none() {
                let cause = format!("{:?} is not a UUID", short(raw.get_ref()));
                return refuse(location, cause, "write it as uuidgen does: 8-4-4-4-12 hexadecimal digits");
            }
        }
        if let Some(raw) = raw.serial {
            let location = self.note(&raw);
            if !is_serial(raw.get_ref()) {
                let cause = format!("{:?} is not a serial number", short(raw.get_ref()));
                return refuse(location, cause, "use 1 to 64 printable ASCII characters");
            }
            platform.serial = Some(raw.into_inner());
        }
        for (number, raw) in raw.oem_strings.into_iter().enumerate() {
            let location = self.note(&raw);
            if number >= OEM_STRINGS_MAX {
                return refuse(
                    location,
                    format!("a guest has at most {OEM_STRINGS_MAX} OEM strings"),
                    "remove some",
                );
            }
            let string = raw.into_inner();
            let is_printable = string.bytes().all(|byte| (b' '..=b'~').contains(&byte));
            if !(1..=OEM_STRING_BYTES_MAX).contains(&string.len()) || !is_printable {
                let cause = format!("{:?} cannot be an OEM string", short(&string));
                return refuse(location, cause, "use 1 to 1024 printable ASCII characters");
            }
            platform.oem_strings.push(string);
        }
        Ok(platform)
    }
}

/// Hexadecimal digits in groups of 8, 4, 4, 4 and 12.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<usize> = text.split('-').map(str::len).collect();
    if groups != [8, 4, 4, 4, 12] || !text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(&text.replace('-', ""), 16).ok()?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};

    fn platform(table: &str) -> Result<Platform, Refusal> {
        parse(&format!("{GOOD}\n[platform]\n{table}\n")).map(|located| located.guest.platform)
    }

    #[test]
    fn reads_who_a_guest_is() {
        assert_eq!(parse(GOOD).unwrap().guest.platform, Platform::default());
        let told = platform(
            "uuid = \"00112233-4455-6677-8899-AABBccddeeff\"\nserial = \"ds=nocloud\"\noem_strings = [\"a b\", \"c\"]\nrtc = true",
        );
        let uuid =
            [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        let oem_strings = vec!["a b".to_owned(), "c".to_owned()];
        let wanted = Platform { uuid: Some(uuid), serial: Some("ds=nocloud".into()), oem_strings, rtc: true };
        assert_eq!(told.unwrap(), wanted);
    }

    #[test]
    fn refuses_what_no_table_can_tell() {
        let refused = |table: &str| {
            let refusal = platform(table).unwrap_err();
            assert_eq!(refusal.code, "bad-platform", "{refusal}");
            refusal.to_string()
        };
        for uuid in
            ["", "001122334455-6677-8899-aabb-ccddeeff", "+0112233-4455-6677-8899-aabbccddeeff", "0-0-0-0-0"]
        {
            assert!(refused(&format!("uuid = {uuid:?}")).contains("platform.uuid"));
        }
        assert!(refused("serial = \"\"").contains("platform.serial"));
        assert!(refused("serial = \"a\\u0000\"").contains("platform.serial"));
        assert!(refused("oem_strings = [\"\"]").contains("platform.oem_strings"));
        assert!(refused("oem_strings = [\"a\", \"\\u0007\"]").contains("platform.oem_strings"));
        assert!(refused(&format!("oem_strings = [{:?}]", "x".repeat(1025))).contains("1024"));
        assert!(refused(&format!("oem_strings = [{}]", "\"x\", ".repeat(9))).contains("at most 8"));
    }
}
