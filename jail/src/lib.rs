//! The cell: the closed room in which one guest's casemate-vmm runs.
//!
//! The keep opens everything a guest needs and starts the program in a cell with descriptors only. A cell has: namespaces
//! of its own (mount, pid, net, ipc, uts, cgroup), an empty read-only root, no network, a uid and gid of its own, no
//! capability in any set and none to be had (bounding set empty, securebits locked, no_new_privs), a cgroup with limits,
//! rlimits, no environment but one constant, descriptors 0 to 3 and no other, and a Landlock ruleset that handles every right the kernel
//! knows and grants none. It is not dumpable. The program itself puts its seccomp filters on (`casemate-filters`), since
//! they differ by thread.
//!
//! All or nothing: where a part can't be had, the program does not start, and the [`Refusal`](casemate_spec::Refusal)
//! names the part. Three parts (`lacking`) may be without, where the plan says so; the cell then tells that it is weakened.
//! Landlock does not govern descriptors that are handed in; what may be done with those is for seccomp
//! and for whoever chose them.
//!
//! Modules: `plan` is what the caller says; `program` the sealed executable; `cgroup` and `landlock` are made by the
//! caller's process; `child` is what runs between clone and exec; `cell` is the running cell; `inspect`, `limits`, `memory`
//! and `audit` read what the kernel tells of it; `trace` takes the filters out of its threads, and `bpf` tells what they
//! let through; `sys` and `trace` hold the raw system calls, and with them all unsafe code.

mod audit;
mod bpf;
mod cell;
mod cgroup;
mod child;
mod inspect;
mod lacking;
mod landlock;
mod limits;
mod memory;
mod plan;
mod program;
mod start;
mod step;
mod sys;
mod trace;

pub use bpf::{ARCH_X86_64, Answer, Call, Filter};
pub use cell::{Cell, End};
pub use inspect::{Capabilities, CellView, Descriptor, Namespace, ThreadView, inspect};
pub use lacking::{Lack, lacking};
pub use landlock::{Landlock, read_only};
pub use limits::{LimitsView, limits};
pub use memory::MemoryUse;
pub use plan::{CellPlan, CgroupPlan, IoPlan, Rlimits};
pub use program::Program;
pub use start::start;
pub use sys::core_cookie;
pub use trace::{ThreadFilters, filters};
