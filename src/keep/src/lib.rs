//! Admission, lifecycle and care of guests.
