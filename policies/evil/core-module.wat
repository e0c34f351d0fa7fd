(module
  ;; No component: it says itself what its numbers mean.
  (memory (export "memory") 1)
  (func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32) (i32.const 0)))
