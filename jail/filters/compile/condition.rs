//! The comparisons of a rule: `argN == VALUE` and `argN & MASK == VALUE`.

use super::constants;

/// One comparison of one argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    /// Which argument, 0 to 5.
    pub(crate) argument: u8,
    /// The bits that are looked at; all of them for a plain `==`.
    pub(crate) mask: u64,
    /// What they must be; has no bit outside of `mask`.
    pub(crate) value: u64,
    /// Whether the kernel reads the low 32 bits of this argument only; the upper ones are then not compared.
    pub(crate) is_32_bit: bool,
}

/// Arguments that are 32 bits wide in the kernel, whatever the upper half of the register holds. Every other argument is
/// compared in full: that can stop a call that was meant, and never lets through one that was not.
const ARGUMENTS_32_BIT: &[(&str, u8)] = &[
    ("accept4", 3),
    ("epoll_ctl", 1),
    ("eventfd2", 1),
    ("fallocate", 1),
    ("fcntl", 1),
    ("futex", 1),
    ("getsockopt", 1),
    ("getsockopt", 2),
    ("ioctl", 1),
    ("madvise", 2),
    ("memfd_create", 1),
    ("newfstatat", 3),
    ("prctl", 0),
    ("recvmsg", 2),
    ("rt_sigaction", 0),
    ("seccomp", 0),
    ("seccomp", 1),
    ("sendmsg", 2),
    ("statx", 2),
    ("io_uring_register", 1),
    ("tgkill", 0),
    ("tgkill", 2),
];

impl Condition {
    /// Reads a comparison of an argument of `call`.
    pub(crate) fn parse(call: &str, text: &str) -> Result<Self, String> {
        const FORM: &str = "write `arg1 == NAME`, or `arg2 & NAME == 0`; names and numbers are joined by |";
        let (left, right) = text.split_once("==").ok_or_else(|| format!("{text:?} has no `==`; {FORM}"))?;
        let (argument, mask) = match left.split_once('&') {
            Some((argument, mask)) => (argument, Some(terms(mask)?)),
            None => (left, None),
        };
        let digit = argument.trim().strip_prefix("arg").and_then(|digit| digit.parse::<u8>().ok());
        let argument = digit
            .filter(|digit| *digit < 6)
            .ok_or_else(|| format!("{:?} is not one of arg0 to arg5; {FORM}", argument.trim()))?;
        let value = terms(right)?;
        let is_32_bit = ARGUMENTS_32_BIT.contains(&(call, argument));
        let width = if is_32_bit { u64::from(u32::MAX) } else { u64::MAX };
        let mask = mask.unwrap_or(width);
        if mask == 0 {
            return Err(format!("{text:?} looks at no bit, so it always holds"));
        }
        if value & !mask != 0 || mask & !width != 0 {
            return Err(format!("{text:?} can never hold: {value:#x} has bits that are not looked at"));
        }
        Ok(Self { argument, mask, value, is_32_bit })
    }
}

/// The value of `A|B|0x10`.
fn terms(text: &str) -> Result<u64, String> {
    let mut sum = 0;
    for term in text.split('|').map(str::trim) {
        let value = match term.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None if term.starts_with(|first: char| first.is_ascii_digit()) => term.parse().ok(),
            None => constants::value(term),
        };
        sum |= value.ok_or_else(|| {
            format!("{term:?} is neither a number nor a constant of jail/filters/compile/constants.rs; add it there")
        })?;
    }
    Ok(sum)
}
