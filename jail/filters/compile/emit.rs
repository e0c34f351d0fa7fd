//! Programs and tables from checked rules.

use std::{collections::BTreeMap, fmt::Write};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::{Condition, File, Rule, refuse_idle, shorten::shorten, union};

/// The Rust source of a filter that stands alone.
pub(crate) fn source_alone(file: &File, role: &str) -> Result<String, String> {
    let mut source = String::new();
    emit(&mut source, role, &file.rules.iter().collect::<Vec<_>>())?;
    Ok(source)
}

/// The Rust source of the filters of one program: for its first phase, `wide`, which allows what `first` says and what the narrow
/// ones say, and for each role of `narrow`, by name, a BPF program and its rules.
pub(crate) fn source(wide: &str, first: &File, narrow: &[(&str, File)]) -> Result<String, String> {
    let mut source = String::new();
    for (role, file) in narrow {
        refuse_idle(&first.rules, &file.rules)?;
        source += &source_alone(file, &role.to_uppercase())?;
    }
    // Rules of a call are looked at in this order, and both filters look at each call: what is called most, at every exit of a
    // processor, stands first in the first of the narrow ones.
    emit(&mut source, wide, &union(narrow.iter().map(|(_, file)| file).chain([first])))?;
    Ok(source)
}

fn emit(source: &mut String, role: &str, rules: &[&Rule]) -> Result<(), String> {
    let program = program(rules)?;
    let instructions = program.len();
    let mut write = || -> std::fmt::Result {
        writeln!(source, "static {role}_PROGRAM: [libc::sock_filter; {instructions}] = [")?;
        for sock_filter { code, jt, jf, k } in &program {
            writeln!(source, "    libc::sock_filter {{ code: {code:#x}, jt: {jt}, jf: {jf}, k: {k:#x} }},")?;
        }
        writeln!(source, "];\nstatic {role}_RULES: &[Rule] = &[")?;
        for Rule { call, when, fails_with, why, unseen, file, conditions, .. } in rules {
            let fails_with = fails_with.as_ref().map(|(name, _)| name);
            let file = file.rsplit('/').next().unwrap_or(file).trim_end_matches(".toml");
            write!(
                source,
                "    Rule {{ call: {call:?}, when: &{when:?}, fails_with: {fails_with:?}, why: {why:?}, \
                 unseen: {unseen:?}, file: {file:?}, comparisons: &["
            )?;
            for Condition { argument, mask, value, .. } in conditions {
                write!(
                    source,
                    "Comparison {{ argument: {argument}, mask: {mask:#x}, value: {value:#x} }}, "
                )?;
            }
            writeln!(source, "] }},")?;
        }
        writeln!(source, "];")
    };
    write().map_err(|error| error.to_string())
}

/// The program that allows what the rules allow, gives their errors, and kills the process for all else.
fn program(rules: &[&Rule]) -> Result<Vec<sock_filter>, String> {
    let mut allowed: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.fails_with.is_none()) {
        let chain = allowed.entry(i64::from(rule.number)).or_insert_with(|| Some(Vec::new()));
        if rule.conditions.is_empty() {
            // Allowed whatever its arguments are: what else is said of the call adds nothing.
            *chain = None;
        } else if let Some(chain) = chain {
            let conditions = rule.conditions.iter().map(compare).collect::<Result<Vec<_>, _>>()?;
            chain.push(SeccompRule::new(conditions).map_err(|error| format!("{}: {error}", rule.call))?);
        }
    }
    let allowed = allowed.into_iter().map(|(number, chain)| (number, chain.unwrap_or_default())).collect();
    let filter =
        SeccompFilter::new(allowed, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
    let rest: BpfProgram =
        filter.and_then(BpfProgram::try_from).map_err(|error| format!("seccompiler: {error}"))?;
    let mut program = errors(rules);
    program.extend(rest);
    shorten(&program)
}

/// seccompiler knows two actions a filter, so the calls that fail with an error are answered in front of its program. On
/// another architecture the same number is another call, which then fails as well instead of killing.
fn errors(rules: &[&Rule]) -> Vec<sock_filter> {
    const LOAD_NUMBER: sock_filter = sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let mut program = Vec::new();
    for rule in rules {
        let Some((_, error)) = &rule.fails_with else { continue };
        if program.is_empty() {
            program.push(LOAD_NUMBER);
        }
        program.push(sock_filter { code: 0x15, jt: 0, jf: 1, k: rule.number });
        program.push(sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ERRNO | u32::from(*error),
        });
    }
    program
}

fn compare(condition: &Condition) -> Result<SeccompCondition, String> {
    let Condition { argument, mask, value, is_32_bit } = *condition;
    let width = if is_32_bit { SeccompCmpArgLen::Dword } else { SeccompCmpArgLen::Qword };
    let whole = if is_32_bit { u64::from(u32::MAX) } else { u64::MAX };
    let operator = if mask == whole { SeccompCmpOp::Eq } else { SeccompCmpOp::MaskedEq(mask) };
    SeccompCondition::new(argument, width, operator, value).map_err(|error| error.to_string())
}
