//! The hardware lab and the tests that need KVM and VFIO.
