;; Denies with one reason whose message is no UTF-8.
(data (i32.const 12288) "\ff\fe\fd")
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32)
  (i32.store8 (i32.const 4096) (i32.const 1))
  (i32.store (i32.const 4100) (i32.const 8192))
  (i32.store (i32.const 4104) (i32.const 1))
  (i32.store (i32.const 8204) (i32.const 12288))
  (i32.store (i32.const 8208) (i32.const 3))
  (i32.const 4096))
