//! Virtio queues, devices and the PCI transport over a memory trait.
