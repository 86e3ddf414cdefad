package agent_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
)

// BenchmarkPassOn has one host that has an image give it to another one, over TLS and loopback, as a stage does: received, checked and stored there.
// cpu-s/GB is of both hosts together, user and system.
func BenchmarkPassOn(b *testing.B) {
	w := newWorld(b, 64<<20)
	ca := filepath.Join(w.dir, "ca")
	if err := peer.Init(ca); err != nil {
		b.Fatal(err)
	}
	nodes := w.swarm(2, func(_ int, o *agent.Options) {
		dir := filepath.Join(w.dir, "keys", o.Name)
		issued, err := peer.Issue(ca, o.Name, nil, time.Hour)
		if err == nil {
			err = issued.Write(dir)
		}
		if err != nil {
			b.Fatal(err)
		}
		id, err := peer.LoadIdentity(dir)
		if err != nil {
			b.Fatal(err)
		}
		o.Network, o.Listen = peer.NewTCP(id, peer.TCPOptions{}), []string{"127.0.0.1:0"}
	})
	stage := func(job string, n int) {
		q := control.StageRequest{Image: w.image, Job: job, Ready: control.Complete, UID: -1, NoMount: true}
		for _, x := range nodes[:n] {
			q.Hosts = append(q.Hosts, x.name+"="+x.agent.Addr())
		}
		r, err := nodes[0].client.Stage(b.Context(), q, nil)
		if err != nil || r.Failed > 0 {
			b.Fatal(r, err)
		}
	}
	stage("first", 1)
	var cpu time.Duration
	i := 0
	for b.Loop() {
		b.StopTimer()
		i++
		job := fmt.Sprint("job", i)
		before := processor()
		b.StartTimer()
		stage(job, 2)
		b.StopTimer()
		cpu += processor() - before
		if _, err := nodes[0].client.Unstage(b.Context(), control.UnstageRequest{Job: job}); err != nil {
			b.Fatal(err)
		}
		w.forgetBytes(nodes[1])
		b.StartTimer()
	}
	b.SetBytes(w.size)
	b.ReportMetric(cpu.Seconds()/(float64(w.size)*float64(i)/1e9), "cpu-s/GB")
}

// processor is the processor time of this process.
func processor() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
