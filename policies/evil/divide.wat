;; Divides by zero.
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32)
  (i32.div_u (i32.const 1) (i32.load (i32.const 16))))
