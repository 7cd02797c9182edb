// Package tig has the one type that nerdctl's packages name.
package tig

// T is what nerdctl's tests pass on.
type T interface {
	Helper()
	FailNow()
	Fail()
	Log(args ...any)
	Name() string
	TempDir() string
	Skip(args ...any)
}
