//! The same program in fewer instructions. seccompiler jumps to jumps, ends each call by both verdicts, and compares what a mask has cleared:
//! the kernel translates all of that for each thread that puts a filter on, and runs it at each of its calls.

use std::collections::BTreeSet;

use seccompiler::sock_filter;

// Instructions of classic BPF (`linux/bpf_common.h`), as far as filters here are made of them.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// What comes after an instruction, by places in the program as it was.
#[derive(Clone, Copy)]
enum Next {
    /// The one behind it.
    Behind,
    /// Another, which leaves nothing to be done here.
    To(usize),
    /// One of two.
    Either(usize, usize),
    Nothing,
}

/// The program without what is never run, and without jumps to jumps.
pub(super) fn shorten(program: &[sock_filter]) -> Result<Vec<sock_filter>, String> {
    let mut next =
        program.iter().enumerate().map(|(at, op)| next_of(at, op)).collect::<Result<Vec<_>, _>>()?;
    leave_out_cleared(program, &mut next);
    // A jump on a condition reaches 255 instructions. Those from which more would be jumped over go by a jump of their own, as before.
    let mut by_jump = BTreeSet::new();
    loop {
        let direct = |at: usize, to: usize| if by_jump.contains(&(at, to)) { to } else { last_of(&next, to) };
        let straight: Vec<Next> = (next.iter().enumerate())
            .map(|(at, next)| match *next {
                Next::To(to) => Next::To(direct(at, to)),
                Next::Either(yes, no) => Next::Either(direct(at, yes), direct(at, no)),
                other => other,
            })
            .collect();
        let kept = kept_of(&straight);
        let (short, too_far) = laid_out(program, &straight, &kept)?;
        if too_far.is_empty() {
            return Ok(short);
        }
        let before = by_jump.len();
        for at in too_far {
            if let Some(Next::Either(yes, no)) = next.get(at) {
                by_jump.extend([(at, *yes), (at, *no)]);
            }
        }
        if by_jump.len() == before {
            return Err("a filter jumps further than its instructions can".to_owned());
        }
    }
}

fn next_of(at: usize, op: &sock_filter) -> Result<Next, String> {
    let to = |offset: usize| at + 1 + offset;
    match op.code {
        LOAD | AND => Ok(Next::Behind),
        JUMP => usize::try_from(op.k).map(|offset| Next::To(to(offset))).map_err(|error| error.to_string()),
        JUMP_IF_EQUAL => Ok(Next::Either(to(op.jt.into()), to(op.jf.into()))),
        RETURN => Ok(Next::Nothing),
        code => Err(format!("instruction {code:#x} is not known to filters")),
    }
}

/// A word of which all is cleared is 0: nothing has to be loaded to know.
fn leave_out_cleared(program: &[sock_filter], next: &mut [Next]) {
    for at in 0..program.len() {
        let [load, and, jump] = [at, at + 1, at + 2].map(|at| program.get(at).map(|op| (op.code, op.k)));
        if (load.map(|(code, _)| code), and, jump) != (Some(LOAD), Some((AND, 0)), Some((JUMP_IF_EQUAL, 0))) {
            continue;
        }
        // What follows loads anew, so nobody misses the 0.
        if let Some(Next::Either(yes, _)) = next.get(at + 2).copied()
            && program.get(last_of(next, yes)).is_some_and(|op| matches!(op.code, LOAD | RETURN))
            && let Some(load) = next.get_mut(at)
        {
            *load = Next::To(yes);
        }
    }
}

/// Where jumps from here lead.
fn last_of(next: &[Next], from: usize) -> usize {
    let mut at = from;
    // They lead on, never back.
    while let Some(Next::To(to)) = next.get(at) {
        at = *to;
    }
    at
}

/// What can be reached.
fn kept_of(next: &[Next]) -> BTreeSet<usize> {
    let (mut kept, mut open) = (BTreeSet::new(), vec![0]);
    while let Some(at) = open.pop() {
        if !kept.insert(at) {
            continue;
        }
        match next.get(at) {
            Some(Next::Behind) => open.push(at + 1),
            Some(Next::To(to)) => open.push(*to),
            Some(Next::Either(yes, no)) => open.extend([*yes, *no]),
            Some(Next::Nothing) | None => {}
        }
    }
    kept
}

/// The instructions that are kept, in their order, and the places of those that would jump too far.
fn laid_out(
    program: &[sock_filter],
    next: &[Next],
    kept: &BTreeSet<usize>,
) -> Result<(Vec<sock_filter>, Vec<usize>), String> {
    // A jump to what stands behind it anyway is none.
    let follows = |at: usize, to: usize| kept.range(at + 1..).next() == Some(&to);
    let stays = |at: &usize| !matches!(next.get(*at), Some(Next::To(to)) if follows(*at, *to));
    let places: Vec<usize> = kept.iter().copied().filter(stays).collect();
    // Of one that was left out, the place of what comes behind it.
    let place = |at: usize| places.partition_point(|place| *place < at);
    let (mut short, mut too_far) = (Vec::new(), Vec::new());
    for (own, at) in places.iter().enumerate() {
        let offset = |to: usize| place(to).checked_sub(own + 1).ok_or("a filter jumps back");
        let op = program.get(*at).ok_or("a filter has no end")?;
        short.push(match next.get(*at) {
            Some(Next::To(to)) => {
                let k = u32::try_from(offset(*to)?).map_err(|error| error.to_string())?;
                sock_filter { code: JUMP, jt: 0, jf: 0, k }
            }
            Some(Next::Either(yes, no)) => {
                let (yes, no) = (u8::try_from(offset(*yes)?), u8::try_from(offset(*no)?));
                if yes.is_err() || no.is_err() {
                    too_far.push(*at);
                }
                sock_filter { jt: yes.unwrap_or(0), jf: no.unwrap_or(0), ..op.clone() }
            }
            _ => op.clone(),
        });
    }
    Ok((short, too_far))
}
