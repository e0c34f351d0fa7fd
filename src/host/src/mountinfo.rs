//! The kernel's table of mounts, `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `major:minor` of the filesystem; major 0 when no single block device is behind it (btrfs, overlay, tmpfs).
    pub(crate) device: String,
    /// Where it is mounted, unescaped.
    pub(crate) mount_point: String,
    /// `ext4`, `9p`.
    pub(crate) fs_type: String,
    /// What the mount was asked for: a device node, a tag, anything.
    pub(crate) source: String,
}

/// Reads the whole table; `Err` is the number (from 1) of the first line that is not of the format.
pub(crate) fn parse(text: &str) -> Result<Vec<Mount>, usize> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty());
    lines.map(|(index, line)| parse_line(line).ok_or(index + 1)).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    // `ID PARENT MAJOR:MINOR ROOT MOUNT-POINT OPTIONS [TAGS...] - TYPE SOURCE SUPER-OPTIONS`
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(2);
    let device = front.next().filter(|device| is_device(device))?;
    let mount_point = front.nth(1)?;
    let mut back = back.split(' ');
    let fs_type = back.next()?;
    // The source may be an empty string: the kernel then writes two spaces.
    let source = back.next()?;
    Some(Mount {
        device: device.to_owned(),
        mount_point: unescape(mount_point),
        fs_type: fs_type.to_owned(),
        source: unescape(source),
    })
}

fn is_device(text: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    text.split_once(':').is_some_and(|(major, minor)| number(major) && number(minor))
}

/// Undoes the kernel's escapes: `\040` is a space, likewise tab, newline, backslash and `#`.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let Some((&first, rest)) = bytes.split_first() {
        let digits =
            rest.get(..3).filter(|three| first == b'\\' && three.iter().all(|b| (b'0'..=b'7').contains(b)));
        let value = digits.map(|three| three.iter().fold(0u32, |sum, b| sum << 3 | u32::from(b - b'0')));
        match value.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                out.push(byte);
                bytes = rest.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                bytes = rest;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_lines() {
        let text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                    24 31 0:22 / /proc rw,relatime - proc none rw\n41 1 0:40 / /run rw - tmpfs  rw\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts[0].device, "98:0");
        assert_eq!(mounts[0].mount_point, "/mnt 2");
        assert_eq!((mounts[0].fs_type.as_str(), mounts[0].source.as_str()), ("ext3", "/dev/root"));
        assert_eq!(mounts[1].fs_type, "proc");
        assert_eq!(mounts[2].source, "");
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        assert_eq!(
            parse("24 31 0:22 / /proc rw - proc none rw\n24 31 zero / /proc rw - proc none rw\n"),
            Err(2)
        );
        assert_eq!(parse("24 31 0:22 / /proc rw proc none rw"), Err(1));
    }

    #[test]
    fn keeps_what_is_no_escape() {
        assert_eq!(unescape("a\\04b\\9\\777\\134\\"), "a\\04b\\9\\777\\\\");
    }

    proptest! {
        #[test]
        fn never_panics(text in "[0-9 :/a-z\\\\\n-]{0,120}") {
            let _ = parse(&text);
        }

        #[test]
        fn mount_points_come_back(point in "/[ -~\t\n]{0,30}") {
            let escaped: String = point.bytes().map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}"),
                b => char::from(b).to_string(),
            }).collect();
            let mounts = parse(&format!("1 2 3:4 / {escaped} rw - ext4 /dev/x rw\n")).unwrap();
            prop_assert_eq!(&mounts[0].mount_point, &point);
        }
    }
}
