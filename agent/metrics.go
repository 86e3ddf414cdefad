package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the agent's counts as Prometheus reads them.
type metrics struct {
	registry   *prometheus.Registry
	received   *prometheus.CounterVec // bytes, by source
	sent       prometheus.Counter
	stages     *prometheus.CounterVec // by outcome
	took       prometheus.Histogram
	passedOver prometheus.Counter
	wrong      prometheus.Counter
	indexed    prometheus.Counter
	mounts     prometheus.Counter
	denied     prometheus.Counter
}

func newMetrics(a *Agent) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	vector := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	m := &metrics{
		registry:   prometheus.NewRegistry(),
		received:   vector("muster_received_bytes_total", "Bytes of blobs that were received, by source.", "source"),
		sent:       counter("muster_sent_bytes_total", "Bytes of blobs that were read to be passed on to other agents."),
		stages:     vector("muster_stages_total", "Stages that ended, by outcome.", "outcome"),
		took:       prometheus.NewHistogram(prometheus.HistogramOpts{Name: "muster_stage_seconds", Help: "Time from the order to readiness on this host.", Buckets: prometheus.ExponentialBuckets(0.1, 2, 14)}),
		passedOver: counter("muster_peers_passed_over_total", "Hosts that were passed over in a job: late, gone or lying."),
		wrong:      counter("muster_wrong_bytes_total", "Bytes that did not match their digest."),
		indexed:    counter("muster_tables_built_total", "Tables of layers that were built here."),
		mounts:     counter("muster_mounts_total", "Mounts that were made."),
		denied:     counter("muster_denied_total", "Requests of other agents for blobs that they may not have."),
	}
	for _, source := range []string{"peer", "origin"} {
		m.received.WithLabelValues(source)
	}
	m.registry.MustRegister(
		m.received, m.sent, m.stages, m.took, m.passedOver, m.wrong, m.indexed, m.mounts, m.denied,
		gauge("muster_jobs", "Jobs on this host.", func() float64 {
			a.mu.Lock()
			defer a.mu.Unlock()
			return float64(len(a.jobs))
		}),
		gauge("muster_store_used_bytes", "Bytes that the store takes on disk.", func() float64 {
			u, err := a.o.Store.Usage()
			if err != nil {
				return 0
			}
			return float64(u.Used)
		}),
		gauge("muster_store_quota_bytes", "Most bytes that the store may take.", func() float64 { return float64(a.o.Store.Quota()) }),
		gauge("muster_peer_connections", "Connections of other agents.", func() float64 { return float64(a.server.Stats().Conns) }),
		gauge("muster_members", "Agents that gossip knows.", func() float64 { return float64(len(a.members())) }),
	)
	return m
}

// serveMetrics answers /metrics, and /healthz with 200, or with 503 while draining.
func (a *Agent) serveMetrics(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		draining := a.draining
		a.mu.Unlock()
		if draining {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		// Whoever watches sees the draining; the last scrape is not cut off.
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.o.Drain+time.Second)
		defer cancel()
		select {
		case <-a.ctx.Done():
		case <-a.drained:
		case <-end.Done():
		}
		_ = s.Close()
	}()
	err := s.Serve(l)
	<-done
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
