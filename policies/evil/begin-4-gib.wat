;; Wants 4 GiB before anything of it runs.
(memory $more 65536)
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32) (i32.const 4096))
