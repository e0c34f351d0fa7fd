//! Large pages, for guests' memory.

use super::{Check, CheckState, check, ok_or};
use crate::{Host, host::attribute};

/// What the kernel makes by itself, and what was set aside.
pub(super) fn large_pages(host: &Host) -> Check {
    let setting = attribute(host.path("sys/kernel/mm/transparent_hugepage/enabled")).unwrap_or_default();
    // The chosen word stands in brackets.
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("none in this kernel");
    let count = |size: &str, file: &str| {
        attribute(host.path(format!("sys/kernel/mm/hugepages/hugepages-{size}/{file}")))
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let set_aside = [("2048kB", "2 MiB"), ("1048576kB", "1 GiB")].map(|(size, name)| {
        format!("{} of {} of {name} free", count(size, "free_hugepages"), count(size, "nr_hugepages"))
    });
    let state = ok_or(matches!(chosen, "always" | "madvise"), CheckState::Warn);
    let remedy = "guests run slower without: echo madvise >/sys/kernel/mm/transparent_hugepage/enabled";
    let found = format!("transparent: {chosen}; set aside: {}", set_aside.join(", "));
    check("large-pages", state, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn both_kinds_are_told() {
        let machine = Fixture::typical();
        let setting = "sys/kernel/mm/transparent_hugepage/enabled";
        machine.write(setting, "always [madvise] never\n");
        machine.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        machine.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4\n");
        let told = large_pages(&machine.host());
        assert_eq!(told.state, CheckState::Ok);
        let found = "transparent: madvise; set aside: 3 of 4 of 2 MiB free, 0 of 0 of 1 GiB free";
        assert_eq!(told.found, found);
        machine.write(setting, "always madvise [never]\n");
        assert_eq!(large_pages(&machine.host()).state, CheckState::Warn);
    }
}
