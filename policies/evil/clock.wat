(component
  ;; Wants to know the time, and with it how long something takes.
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance (export "now" (func (result u64))))))
