package costmodel

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// Where a parameter comes from.
const (
	Given    = "given"    // by the user
	Measured = "measured" // on this machine, now
	Fitted   = "fitted"   // on pulls: the study's, or a site's own
	Assumed  = "assumed"  // by whoever wrote this program; the note says on what grounds
)

// A Parameter is a number that an estimate is made with.
type Parameter struct {
	Name   string `json:"name"`
	Unit   string `json:"unit"`
	Range         // Low and High are equal to Mid where it is certain
	Origin string `json:"origin"`
	Note   string `json:"note"`
}

// Parameters by name. The names are in [Defaults].
type Parameters map[string]Parameter

// Names of parameters.
const (
	ParamPrice      = "price"
	ParamRate       = "rate"
	ParamGrowth     = "growth"
	ParamRamp       = "ramp"
	ParamSlow       = "slow-ratio"
	ParamLink       = "link"
	ParamOrigin     = "origin-rate"
	ParamSharedFS   = "shared-fs"
	ParamEgress     = "egress-price"
	ParamNAT        = "nat-price"
	ParamTouched    = "touched"
	ParamLazyMount  = "lazy-mount"
	ParamLazyRate   = "lazy-rate"
	ParamInflate    = "inflate"
	ParamSSD        = "ssd-factor"
	ParamZstdSize   = "zstd-size"
	ParamZstdFactor = "zstd-factor"
	ParamSquashSize = "squashfs-size"
	ParamWarm       = "warm-mount"
	ParamHop        = "hop"
)

func exactly(v float64) Range { return Range{v, v, v} }

// studyNodes is the cluster that the fitted rate belongs to: the growth with the cluster counts from there.
const studyNodes = 32

// Defaults are the parameters that m and the program bring, all but the price, which nobody can assume. registry is where the
// images are, as [Registry] names it.
func Defaults(m *Model, registry string) Parameters {
	p := Parameters{}
	set := func(name, unit string, r Range, origin, note string) {
		p[name] = Parameter{Name: name, Unit: unit, Range: r, Origin: origin, Note: note}
	}
	source := "fitted on " + m.Source
	if m.Rate.Mid > 0 {
		set(ParamRate, "B/s", m.Rate, Fitted, "download and unpack of real images above 200 MB per host: "+source)
	} else {
		set(ParamRate, "B/s", Range{22e6, 31.5e6, 46e6}, Assumed, "the study's; the model given has no real pull above 200 MB")
	}
	worst, best := 0.0, math.Inf(1)
	for key := range maps.Keys(m.Pull) {
		name, isApp := strings.CutSuffix(key, "|"+ContentApp)
		if !isApp {
			continue
		}
		if g, ok := m.Growth(name); ok {
			worst, best = max(worst, g), min(best, g)
		}
	}
	if g, ok := m.Growth(registry); ok {
		set(ParamGrowth, "per 100 nodes", Range{g / 2, g, 1.5 * g}, Fitted, "longer pulls in larger clusters from "+registry+": "+source)
	} else {
		if math.IsInf(best, 1) {
			best = 0
		}
		set(ParamGrowth, "per 100 nodes", Range{best, best, worst}, Assumed, fmt.Sprintf("no data of registry %q: between the best and the worst registry of %s", registry, m.Source))
	}
	if r, ok := m.Ramp[ContentApp]; ok {
		set(ParamRamp, "s/host", Range{r[1] / 2, r[1], 2 * r[1]}, Fitted, "between the first and the last start of a pull: "+source)
	} else {
		set(ParamRamp, "s/host", Range{0.02, 0.04, 0.08}, Assumed, "the study's")
	}
	if m.Spread.SlowShare > 0 {
		set(ParamSlow, "×", m.Spread.SlowRatio, Fitted, fmt.Sprintf("slow hosts against the median, %.1f %% of hosts: %s", 100*m.Spread.SlowShare, source))
	} else {
		set(ParamSlow, "×", Range{1, 1, 1.18}, Assumed, "no slow host in the model's data")
	}
	set(ParamLink, "B/s", Range{0.6e9, 1.25e9, 3e9}, Assumed, "10 Gbit/s per host; give --link")
	set(ParamOrigin, "B/s", Range{100e6, 400e6, 1.6e9}, Assumed, "what a registry gives to up to 16 seeds of one cluster together; give --origin-rate")
	set(ParamSharedFS, "B/s", Range{1e9, 5e9, 20e9}, Assumed, "reads of all hosts together from a shared file system; give --shared-fs")
	set(ParamEgress, "$/GB", exactly(0), Assumed, "registry in the same region; give --egress-price")
	set(ParamNAT, "$/GiB", exactly(0), Assumed, "no NAT gateway; give --nat-price (Cloud NAT: 0.045)")
	set(ParamTouched, "share", Range{0.02, 0.13, 0.3}, Assumed, "of an image read before it works: 0.13 for 'import torch', measured on one machine")
	mount := Range{0.5, 1.2, 4}
	origin, note := Assumed, "to mount an image with an index: measured on one machine"
	if f, ok := anyMount(m); ok {
		mount, origin, note = Range{f / 2, f, 3 * f}, Fitted, "to mount a streamed image: "+source
	}
	set(ParamLazyMount, "s", mount, origin, note)
	set(ParamLazyRate, "B/s", Range{5e6, 9.7e6, 30e6}, Assumed, "compressed bytes that a program faults in one after another: SOCI and stargz, 'import torch', one machine")
	set(ParamInflate, "B/s", Range{60e6, 120e6, 240e6}, Assumed, "compressed bytes inflated, hashed and indexed per core as they stream; --measure measures it here")
	pd, ssd := m.Pull["gke-ar-pd|"+ContentZeros].PerUnpackedGB, m.Pull["gke-ar-ssd|"+ContentZeros].PerUnpackedGB
	if pd > 0 && ssd > 0 {
		f := min(1, ssd/pd)
		set(ParamSSD, "×", Range{max(0.4, f-0.2), f, 1}, Fitted, "time to unpack on local SSD against persistent disk, images of zeros: "+source)
	} else {
		set(ParamSSD, "×", Range{0.5, 0.75, 1}, Assumed, "time to unpack on local SSD against persistent disk")
	}
	set(ParamZstdSize, "×", Range{0.8, 0.9, 1}, Assumed, "size of zstd layers against gzip")
	set(ParamZstdFactor, "×", Range{0.55, 0.7, 0.9}, Assumed, "time to unpack zstd layers: inflating is 40 % of it, writing files stays")
	set(ParamSquashSize, "×", Range{0.9, 1.05, 1.3}, Assumed, "size of a squashfs or SIF file against gzip layers")
	set(ParamWarm, "s", Range{0.1, 0.3, 1}, Assumed, "to mount an image whose bytes are in the host's store")
	set(ParamHop, "s", Range{0.005, 0.02, 0.1}, Assumed, "one piece from host to host in muster's swarm")
	return p
}

// anyMount is the time of a mount, of real images where there are any.
func anyMount(m *Model) (float64, bool) {
	for _, content := range []string{ContentApp, ContentZeros} {
		for _, key := range slices.Sorted(maps.Keys(m.Mount)) {
			if strings.HasSuffix(key, "|"+content) {
				return m.Mount[key].Fixed, true
			}
		}
	}
	return 0, false
}

// Registry names the registry of an image by its host, as models do: ghcr.io is ghcr, Artifact Registry is ar.
func Registry(host string) string {
	for _, known := range []struct{ suffix, name string }{
		{"ghcr.io", "ghcr"},
		{"pkg.dev", "ar"},
		{"gcr.io", "gcr"},
		{".amazonaws.com", "ecr"},
		{"public.ecr.aws", "ecr"},
		{".azurecr.io", "acr"},
		{"quay.io", "quay"},
		{"nvcr.io", "nvcr"},
		{"docker.io", "dockerhub"},
	} {
		if host == strings.TrimPrefix(known.suffix, ".") || strings.HasSuffix(host, known.suffix) {
			return known.name
		}
	}
	return host
}

// Instances are the prices of the study in dollars per hour (2024).
var Instances = map[string]float64{
	"p5.48xlarge":      98.32,
	"p3dn.24xlarge":    34.33,
	"hpc6a.48xlarge":   2.88,
	"HB120-96rs_v3":    3.60,
	"ND40rs_v2":        22.03,
	"c2d-standard-112": 5.09,
	"n1-standard-16":   0.76,
	"n1-standard-64":   3.04,
	"V100":             2.48,
}

// PriceOf is the price of an instance type; the error names those that are known.
func PriceOf(instance string) (Parameter, error) {
	p, ok := Instances[instance]
	if !ok {
		return Parameter{}, fmt.Errorf("%w: no price of instance type %.60q; known are %s; any other is given in dollars per hour", ErrScenario,
			instance, strings.Join(slices.Sorted(maps.Keys(Instances)), ", "))
	}
	return Parameter{Name: ParamPrice, Unit: "$/h", Range: exactly(p), Origin: Assumed, Note: "list price of " + instance + " in 2024, from the study"}, nil
}
