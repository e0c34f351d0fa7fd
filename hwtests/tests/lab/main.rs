//! The tests that need KVM, VFIO and PCI devices. Each is a function in one of the modules, and a line in its table.
//!
//! `cargo xtask test` builds what they need and runs them; `cargo test --release -p casemate-hwtests --test lab -- NAME`
//! (or `NAME,NAME`) runs some against what is built. Logs: `target/lab/logs`.

mod admission;
mod audit;
mod board;
mod boot;
mod cell;
mod console;
mod control;
mod devices;
mod disks;
mod documents;
mod endings;
mod engine;
mod filters;
mod governors;
mod host_state;
mod hotplug;
mod keep;
mod lab;
mod network;
mod notices;
mod passthrough;
mod pools;
mod processors;
mod refusals;
mod scrub;
mod slot_devices;
mod sockets;
mod virtio;
mod virtual_functions;

use std::process::ExitCode;

use casemate_hwtests::harness::{self, LabTest};

const TESTS: &[LabTest] = &[
    // The lab itself
    LabTest::new("lab-has-kvm-and-vfio", lab::has_kvm_and_vfio),
    LabTest::new("lab-has-the-devices", lab::has_the_devices),
    LabTest::new("guest-image-boots-in-qemu", lab::guest_image_boots_in_qemu)
        .long("validates the test image alone"),
    // Boot
    LabTest::new("guest-boots-and-powers-off", boot::boots_and_powers_off),
    LabTest::new("guest-sees-what-its-file-says", boot::sees_what_its_file_says),
    LabTest::new("bzimage-boots", boot::bzimage_boots),
    LabTest::new("debians-kernels-boot", boot::debians_kernels_boot).deadline_seconds(300),
    LabTest::new("eight-vcpus-come-up", boot::eight_vcpus_come_up),
    LabTest::new("sixty-four-vcpus-come-up", boot::sixty_four_vcpus_come_up)
        .long("takes minutes where KVM is emulated")
        .deadline_seconds(900),
    LabTest::new("processors-are-as-asked", processors::are_as_asked),
    LabTest::new("memory-is-as-asked", processors::memory_is_as_asked).deadline_seconds(240),
    LabTest::new("vmm-is-small", boot::vmm_is_small),
    LabTest::new("reboot-ends-the-run", boot::reboot_ends_the_run),
    LabTest::new("panic-ends-the-run", boot::panic_ends_the_run),
    LabTest::new("panic-untold-is-a-reset", boot::panic_untold_is_a_reset),
    LabTest::new("guest-boots-without-acpi", boot::boots_without_acpi),
    LabTest::new("triple-fault-ends-the-run", boot::triple_fault_ends_the_run),
    LabTest::new("watchdog-bites", board::watchdog_bites),
    LabTest::new("guest-knows-who-it-is", board::guest_knows_who_it_is),
    LabTest::new("power-button-is-obeyed", boot::power_button_is_obeyed),
    LabTest::new("power-button-ignored-stops", boot::power_button_ignored_stops),
    // Console
    LabTest::new("console-takes-input", console::takes_input),
    LabTest::new("virtio-console-and-ports", console::virtio_console_and_ports),
    LabTest::new("terminal-is-the-guests", console::terminal_is_the_guests),
    // A guest that runs
    LabTest::new("operator-pauses-a-guest", control::pauses_and_goes_on),
    LabTest::new("operator-presses-the-button", control::presses_the_button_by_name),
    LabTest::new("operator-inflates-the-balloon", control::balloon_takes_and_gives),
    LabTest::new("operator-reclaims-free-memory", control::free_memory_is_reclaimed),
    LabTest::new("operator-limits-a-disk", control::limits_hold),
    LabTest::new("operator-resizes-a-disk", control::disk_grows_and_shrinks),
    // Emulated devices
    LabTest::new("config-space-costs-no-exits", control::configuration_is_read_without_exits),
    LabTest::new("disk-is-read-and-written", virtio::disk_is_read_and_written),
    LabTest::new("disk-discards", virtio::disk_discards),
    LabTest::new("read-only-disk-stays", virtio::read_only_disk_stays),
    LabTest::new("raw-disks-keep-what-is-written", disks::raw_disks_keep_what_is_written)
        .deadline_seconds(400),
    LabTest::new("qcow2-disks-keep-what-is-written", disks::qcow2_disks_keep_what_is_written)
        .deadline_seconds(400),
    LabTest::new("network-carries-both-ways", virtio::network_carries_both_ways),
    LabTest::new("cards-carry-long-frames", network::cards_carry_long_frames).deadline_seconds(300),
    LabTest::new("cards-of-several-queues", network::several_queues)
        .long("two processors of a guest and four streams are much for the lab's one")
        .deadline_seconds(450),
    LabTest::new("sockets-reach-both-ways", sockets::sockets_reach_both_ways).deadline_seconds(240),
    LabTest::new("free-memory-goes-back", virtio::free_memory_goes_back),
    LabTest::new("entropy-is-there", virtio::entropy_is_there),
    // Hot-plug
    LabTest::new("slots-are-seen", hotplug::slots_are_seen),
    LabTest::new("disk-and-net-come-and-go", hotplug::disk_and_net_come_and_go).deadline_seconds(400),
    LabTest::new("ten-plugs-in-a-row", hotplug::ten_plugs_in_a_row)
        .long("Linux takes five seconds for each to let go")
        .deadline_seconds(900),
    LabTest::new("slots-refuse", hotplug::refuse_and_force).deadline_seconds(300),
    LabTest::new("devices-come-and-go", slot_devices::come_and_go).deadline_seconds(400),
    LabTest::new("ten-devices-in-a-row", slot_devices::ten_in_a_row)
        .long("Linux takes five seconds for each to let go")
        .deadline_seconds(900),
    LabTest::new("slots-refuse-devices", slot_devices::refuse_and_force).deadline_seconds(400),
    LabTest::new("slot-device-kept-by-its-vmm", slot_devices::kept_by_its_vmm).deadline_seconds(300),
    LabTest::new("slot-devices-are-recovered", slot_devices::recovered_after_a_crash).deadline_seconds(300),
    // Policy
    LabTest::new("too-big-is-refused", admission::too_big_is_refused),
    LabTest::new("swapped-plugin-flips-the-verdict", admission::swapped_plugin_flips_the_verdict),
    LabTest::new("broken-policy-refuses", admission::whatever_is_wrong_with_a_policy_refuses),
    LabTest::new("decisions-are-kept-and-asked-again", admission::decisions_are_kept_and_asked_again),
    LabTest::new("policy-changes-the-guest", admission::a_policy_changes_the_guest_and_knows_its_kernel),
    LabTest::new("policy-signature-is-asked-for", admission::only_what_the_hosts_key_signed_decides),
    LabTest::new("policy-judges-a-drive", admission::a_policy_judges_a_drive),
    LabTest::new("governors-act-and-tell", governors::act_within_bounds_and_tell).deadline_seconds(400),
    LabTest::new("governors-share-fairly", governors::fair_share_and_balloon)
        .long("two guests under load are watched for a while")
        .deadline_seconds(400),
    // Bad input
    LabTest::new("refuses-wrong-values", refusals::wrong_values),
    LabTest::new("refuses-wrong-images", refusals::wrong_images),
    LabTest::new("refuses-files-that-are-none", refusals::files_that_are_none),
    LabTest::new("refuses-devices-that-cannot-be-given", refusals::devices_that_cannot_be_given),
    LabTest::new("refuses-a-drive-in-use", refusals::drive_in_use),
    LabTest::new("refuses-a-network-card-in-use", refusals::network_card_in_use),
    LabTest::new("refuses-what-a-running-guest-has", refusals::what_a_running_guest_has),
    // Physical devices
    LabTest::new("nvme-works-and-comes-back", passthrough::drive_works_and_comes_back),
    LabTest::new("e1000e-works-and-comes-back", passthrough::e1000e_works_and_comes_back),
    LabTest::new("igb-works-and-comes-back", passthrough::igb_works_and_comes_back),
    LabTest::new("ten-reboots-in-a-row", passthrough::ten_reboots_in_a_row)
        .long("ten guests, one after the other")
        .deadline_seconds(900),
    LabTest::new("rtl8139-works-by-intx", passthrough::rtl8139_works_by_intx),
    LabTest::new("two-devices-in-one-guest", passthrough::two_devices_in_one_guest),
    LabTest::new("pool-gives-a-drive-to-one-tenant", pools::pool_gives_a_drive_to_one_tenant),
    LabTest::new("another-card-is-refused", pools::another_card_is_refused),
    LabTest::new("operator-keeps-a-drive-back", pools::operator_keeps_a_drive_back),
    LabTest::new("operator-claims-and-releases", pools::operator_claims_and_releases),
    LabTest::new("vfio-many-kinds-in-one-guest", devices::many_kinds_in_one_guest),
    LabTest::new("vfio-peers-reach-each-other", devices::peers_reach_each_other),
    LabTest::new("vfio-rom-is-the-files", devices::rom_is_the_files),
    LabTest::new("vfio-dma-ends-with-its-guest", devices::dma_ends_with_its_guest),
    LabTest::new("vfio-failed-reset-is-quarantined", devices::failed_reset_is_quarantined),
    LabTest::new("vfio-wanted-back-ends-its-guest", notices::wanted_back_ends_its_guest)
        .deadline_seconds(300),
    LabTest::new("vfio-failed-device-stops-its-guest", notices::failed_device_stops_its_guest),
    LabTest::new("vfio-card-is-reset-as-a-whole", devices::card_is_reset_as_a_whole),
    LabTest::new("vfio-packets-cost-no-exits", devices::packets_cost_no_exits)
        .long("sends 20,000 packets through emulated cards")
        .deadline_seconds(1800),
    LabTest::new("vfio-virtual-functions-of-a-card", virtual_functions::of_a_card_in_two_guests),
    LabTest::new("vfio-virtual-function-goes-with-its-card", virtual_functions::of_a_card_whose_driver_goes),
    LabTest::new(
        "vfio-virtual-function-ends-with-its-cards-reset",
        virtual_functions::of_a_card_that_is_reset,
    ),
    LabTest::new("vfio-virtual-functions-of-a-killed-keep-go", virtual_functions::of_a_killed_keep_go),
    LabTest::new("vfio-virtual-functions-of-a-drive", virtual_functions::of_a_drive_has_its_namespace).long(
        "QEMU 10.0.2 often ends itself when a namespace is taken from a virtual function (nvme_detach_ns)",
    ),
    // Ends from outside
    LabTest::new("killed-vmm-is-told-and-undone", endings::killed_vmm_is_told_and_undone),
    LabTest::new("recover-undoes-a-killed-run", endings::recover_undoes_a_killed_run),
    LabTest::new("next-run-undoes-a-killed-run", endings::next_run_undoes_a_killed_run),
    LabTest::new("broker-undoes-a-killed-keep", endings::broker_undoes_a_killed_keep),
    LabTest::new("run-killed-while-claiming-is-undone", endings::run_killed_while_claiming_is_undone),
    LabTest::new("signals-stop-in-order", endings::signals_stop_in_order),
    LabTest::new("signal-while-claiming-stops-in-order", endings::signal_while_claiming_stops_in_order),
    LabTest::new("drive-is-erased-between-guests", scrub::drive_is_erased_between_guests)
        .deadline_seconds(300),
    LabTest::new("drive-not-erased-goes-to-nobody", scrub::drive_that_cannot_be_erased_goes_to_nobody),
    LabTest::new("missing-vmm-takes-nothing", endings::vmm_that_is_missing_takes_nothing),
    // The cell
    LabTest::new("cell-stops-its-victims", cell::stops_its_victims).deadline_seconds(450),
    LabTest::new("cell-is-closed-around-a-guest", cell::is_closed_around_a_running_guest),
    LabTest::new("audit-tells-what-a-cell-is", audit::tells_what_a_cell_is),
    LabTest::new("cell-cannot-confuse-its-keep", cell::keep_bears_a_captured_vmm),
    LabTest::new("cell-is-weaker-by-leave-alone", cell::is_weaker_by_leave_alone),
    LabTest::new("cell-is-closed-around-the-compiler", cell::is_closed_around_the_policy_compiler),
    LabTest::new("policies-run-in-a-cell", engine::is_in_a_cell_of_its_own),
    LabTest::new("programs-are-copied-once", engine::programs_are_copied_once),
    LabTest::new("cell-hears-its-keep-alone", cell::hears_its_keep_alone),
    LabTest::new("keep-is-not-root", keep::is_not_root),
    LabTest::new("host-file-is-read-without-rights", keep::host_file_is_read_without_rights),
    LabTest::new("captured-keep-gets-nothing", keep::captured_one_gets_nothing),
    LabTest::new("cell-has-no-idle-rules", filters::rules_are_used)
        .long("what threads call by chance, as for a lock that is held, differs from run to run")
        .deadline_seconds(600),
    LabTest::new("filters-hold-a-debug-build", filters::a_debug_build_is_not_stopped)
        .long("it has to be built")
        .deadline_seconds(600),
    LabTest::new("filters-hold-a-build-with-musl", filters::a_build_with_musl_is_not_stopped)
        .long("it has to be built")
        .deadline_seconds(600),
    // The documents
    LabTest::new("commands-in-the-documents-run", documents::commands_run).deadline_seconds(240),
];

fn main() -> ExitCode {
    harness::main(TESTS)
}
