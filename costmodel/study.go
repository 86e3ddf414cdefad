package costmodel

import (
	"bytes"
	_ "embed"
	"sync"
)

// study.json is the model of the study's events, made by the test that compares it (docs/estimate.md).
//
//go:embed study.json
var studyModel []byte

var study = sync.OnceValue(func() *Model {
	m, err := ReadModel(bytes.NewReader(studyModel))
	if err != nil {
		panic("costmodel: the embedded model of the study: " + err.Error())
	}
	return m
})

// Study is the model that a program without a model of its own takes: fitted on the study's pulls. It is shared: do not
// change it.
func Study() *Model { return study() }
