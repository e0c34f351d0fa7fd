;; Denies with one reason, of a severity that there isn't.
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32)
  (i32.store8 (i32.const 4096) (i32.const 1))
  (i32.store (i32.const 4100) (i32.const 8192))
  (i32.store (i32.const 4104) (i32.const 1))
  (i32.store8 (i32.const 8200) (i32.const 99))
  (i32.const 4096))
