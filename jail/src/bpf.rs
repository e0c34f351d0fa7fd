//! What a seccomp filter lets through, found out without a call being made.
//!
//! A filter is a program whose jumps only go forward (Linux `net/core/filter.c`, `bpf_check_classic`; `kernel/seccomp.c`,
//! `seccomp_check_filter`). So it can be walked with arguments that are known or left open; where an open one decides,
//! both ways are taken. That makes the answer a bound from above: what is said to be stopped is stopped for certain.

use std::collections::BTreeSet;

use casemate_filters::Role;

/// `AUDIT_ARCH_X86_64`.
pub const ARCH_X86_64: u32 = 0xc000_003e;

/// One instruction of classic BPF: `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) jt: u8,
    pub(crate) jf: u8,
    pub(crate) k: u32,
}

/// A seccomp filter as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<Instruction>);

/// A call that a filter is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// `AUDIT_ARCH_*`.
    pub architecture: u32,
    /// Its number.
    pub number: u32,
    /// Its arguments; `None` stands for every value.
    pub arguments: [Option<u64>; 6],
}

impl Call {
    /// A call of x86-64 with any arguments.
    pub fn any(number: u32) -> Self {
        Self { architecture: ARCH_X86_64, number, arguments: [None; 6] }
    }

    /// The same with this argument.
    ///
    /// There are six, numbered from 0; another number changes nothing.
    #[must_use]
    pub fn with(mut self, argument: usize, value: u64) -> Self {
        if let Some(place) = self.arguments.get_mut(argument) {
            *place = Some(value);
        }
        self
    }

    /// The word at this offset of `struct seccomp_data`; `None` when it is open.
    fn word(&self, offset: u32) -> Option<u32> {
        match offset {
            0 => Some(self.number),
            4 => Some(self.architecture),
            16..64 => {
                let argument = usize::try_from((offset - 16) / 8).ok()?;
                let value = (*self.arguments.get(argument)?)?;
                let half = if offset % 8 < 4 { value } else { value >> 32 };
                u32::try_from(half & u64::from(u32::MAX)).ok()
            }
            // Of the instruction pointer nothing is known.
            _ => None,
        }
    }
}

/// What may become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// It runs (`SECCOMP_RET_ALLOW`, `SECCOMP_RET_LOG`, and whatever leaves it to somebody else: a tracer, a listener).
    Runs,
    /// It gives an error at once.
    Fails,
    /// It ends the process or its thread, or sends it SIGSYS.
    Kills,
}

impl Filter {
    pub(crate) fn new(instructions: Vec<Instruction>) -> Self {
        Self(instructions)
    }

    /// The filter that this program has for a role.
    pub fn of_role(role: Role) -> Self {
        let program = role.program().iter();
        Self(program.map(|at| Instruction { code: at.code, jt: at.jt, jf: at.jf, k: at.k }).collect())
    }

    /// Its length in instructions.
    pub fn instructions(&self) -> usize {
        self.0.len()
    }

    /// Its bytes as `struct sock_filter` has them, for a digest.
    pub fn bytes(&self) -> Vec<u8> {
        let bytes = self.0.iter().flat_map(|at| {
            let ([a, b], [c, d, e, f]) = (at.code.to_le_bytes(), at.k.to_le_bytes());
            [a, b, at.jt, at.jf, c, d, e, f]
        });
        bytes.collect()
    }

    /// All that may become of this call. A program that can't be followed may do anything.
    pub fn answers(&self, call: &Call) -> BTreeSet<Answer> {
        self.walk(call).unwrap_or_else(|| [Answer::Runs, Answer::Fails, Answer::Kills].into())
    }

    /// Whether this call may run.
    pub fn may_run(&self, call: &Call) -> bool {
        self.answers(call).contains(&Answer::Runs)
    }

    fn walk(&self, call: &Call) -> Option<BTreeSet<Answer>> {
        const STEPS_MAX: usize = 1 << 20;
        let mut answers = BTreeSet::new();
        let mut seen = BTreeSet::new();
        // Where to go on, and the accumulator there; `None` when it is open.
        let mut ways: Vec<(usize, Option<u32>)> = vec![(0, Some(0))];
        while let Some(way) = ways.pop() {
            if !seen.insert(way) {
                continue;
            }
            if seen.len() > STEPS_MAX {
                return None;
            }
            let (at, accumulator) = way;
            let Instruction { code, jt, jf, k } = *self.0.get(at)?;
            let next = at + 1;
            let (yes, no) = (next + usize::from(jt), next + usize::from(jf));
            let mut branch = |holds: fn(u32, u32) -> bool| match accumulator {
                Some(value) => ways.push((if holds(value, k) { yes } else { no }, accumulator)),
                None => ways.extend([(yes, None), (no, None)]),
            };
            match code {
                // BPF_LD | BPF_W | BPF_ABS; the kernel writes it as BPF_LDX once it has looked at it.
                0x20 | 0x21 => ways.push((next, call.word(k))),
                // BPF_ALU | BPF_AND | BPF_K
                0x54 => ways.push((next, accumulator.map(|value| value & k))),
                // BPF_JMP with BPF_JA, and with BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET | BPF_K
                0x05 => ways.push((next.checked_add(usize::try_from(k).ok()?)?, accumulator)),
                0x15 => branch(|value, k| value == k),
                0x25 => branch(|value, k| value > k),
                0x35 => branch(|value, k| value >= k),
                0x45 => branch(|value, k| value & k != 0),
                // BPF_RET | BPF_K
                0x06 => {
                    answers.insert(answer(k));
                }
                _ => return None,
            }
        }
        Some(answers)
    }
}

fn answer(action: u32) -> Answer {
    match action & libc::SECCOMP_RET_ACTION_FULL {
        libc::SECCOMP_RET_KILL_PROCESS | libc::SECCOMP_RET_KILL_THREAD | libc::SECCOMP_RET_TRAP => {
            Answer::Kills
        }
        libc::SECCOMP_RET_ERRNO => Answer::Fails,
        _ => Answer::Runs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn number(name: &str) -> u32 {
        casemate_filters::calls().iter().find(|(_, known)| *known == name).unwrap().0
    }

    #[test]
    fn tells_the_calls_of_a_role_and_no_others() {
        for role in Role::ALL {
            let filter = Filter::of_role(role);
            for (number, name) in casemate_filters::calls() {
                let has_rule = casemate_filters::rules(role)
                    .iter()
                    .any(|rule| rule.call == *name && rule.fails_with.is_none());
                assert_eq!(filter.may_run(&Call::any(*number)), has_rule, "{role}: {name}");
            }
        }
    }

    #[test]
    fn knows_arguments_architectures_and_errors() {
        let filter = Filter::of_role(Role::Control);
        let map = |flags: i32| Call::any(number("mmap")).with(2, u64::from(flags.cast_unsigned()));
        assert!(filter.may_run(&map(libc::PROT_READ)));
        assert!(!filter.may_run(&map(libc::PROT_EXEC | libc::PROT_READ)));
        let read = Call::any(number("read"));
        assert_eq!(filter.answers(&read), [Answer::Runs].into());
        assert_eq!(filter.answers(&Call { architecture: 0x4000_0003, ..read }), [Answer::Kills].into());
        let ioctl = Call::any(number("ioctl"));
        assert_eq!(filter.answers(&ioctl), [Answer::Runs, Answer::Kills].into());
        assert_eq!(filter.answers(&ioctl.with(1, 1)), [Answer::Kills].into());
        let clone3 = Call::any(number("clone3"));
        assert_eq!(Filter::of_role(Role::Build).answers(&clone3), [Answer::Fails].into());
    }

    #[test]
    fn what_cannot_be_followed_may_run() {
        let call = Call::any(0);
        let jump_out = Instruction { code: 0x05, jt: 0, jf: 0, k: u32::MAX };
        let divide = Instruction { code: 0x34, jt: 0, jf: 0, k: 2 };
        for program in [vec![], vec![jump_out], vec![divide]] {
            assert!(Filter::new(program).may_run(&call));
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_always_ends(
            program in proptest::collection::vec((prop_oneof![Just(0x20u16), Just(0x54), Just(0x05), Just(0x15), Just(0x45), Just(0x06), any::<u16>()],
                any::<u8>(), any::<u8>(), any::<u32>()), 0..64),
            call in any::<u32>(),
        ) {
            let program = program.into_iter().map(|(code, jt, jf, k)| Instruction { code, jt, jf, k }).collect();
            let _ = Filter::new(program).answers(&Call::any(call));
        }

        /// What a walk with open arguments excludes does not happen with any argument.
        #[test]
        fn open_arguments_bound_known_ones(call in 0u32..460, arguments in any::<[u64; 6]>(), small in any::<bool>()) {
            for role in Role::ALL {
                let filter = Filter::of_role(role);
                let arguments = arguments.map(|value| Some(if small { value & 0xff } else { value }));
                let known = filter.answers(&Call { arguments, ..Call::any(call) });
                prop_assert_eq!(known.len(), 1);
                prop_assert!(known.is_subset(&filter.answers(&Call::any(call))));
            }
        }
    }
}
