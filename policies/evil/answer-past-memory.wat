;; Warns with a list of reasons that lies outside its memory.
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32)
  (i32.store (i32.const 4108) (i32.const 0x7ffffff0))
  (i32.store (i32.const 4112) (i32.const 0x4000000))
  (i32.const 4096))
