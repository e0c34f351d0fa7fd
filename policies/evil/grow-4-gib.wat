;; Asks for all memory that 32 bits can name, and goes on as if it had got it.
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32)
  (drop (memory.grow (i32.const 65532)))
  (i32.load (i32.const 0xfffffffc)))
