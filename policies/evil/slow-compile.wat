;; Small and well behaved, if it weren't for what the compiler has to do before it can be asked.
(func (export "casemate:policy/gate@1.1.0#admit") (param i32) (result i32) (i32.const 4096))
;; repeated
(func (export "f{n}") (param $a i64) (param $b i64) (param $c i64) (result i64)
  (loop $again
    (local.set $a (i64.add (i64.mul (local.get $a) (local.get $b)) (i64.rotl (local.get $c) (i64.const 7))))
    (local.set $b (i64.xor (i64.div_u (local.get $b) (i64.or (local.get $c) (i64.const 1))) (local.get $a)))
    (if (i64.lt_u (local.get $a) (local.get $b))
      (then (local.set $c (i64.load (i32.wrap_i64 (local.get $a)))))
      (else (i64.store (i32.wrap_i64 (local.get $b)) (local.get $c))))
    (local.set $c (select (local.get $a) (local.get $b) (i64.eqz (local.get $c))))
    (br_if $again (i64.ne (local.get $a) (local.get $c))))
  (local.get $b))
