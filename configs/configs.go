// Package configs holds what an administrator starts from. Every file here is loaded by a test.
package configs

import _ "embed"

// Agent is agent.yaml: every key with its default and what it is for.
//
//go:embed agent.yaml
var Agent []byte
