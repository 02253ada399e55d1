// A plain sink in Go: grpc-go, protobuf-go's structs of Envoy's full schema, one map behind a lock.
//
//	sink PORT WINDOW_MS
//
// What it adds up and prints is what sink.cc does, which says more.
package main

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"

	data "bench/envoy/data/accesslog/v3"
	als "bench/envoy/service/accesslog/v3"

	"google.golang.org/grpc"
)

const graceMs = 5000

type key struct{ tenant, region, gateway, route string }

type sums struct {
	Entries  uint64 `json:"entries"`
	BytesIn  uint64 `json:"bytes_in"`
	BytesOut uint64 `json:"bytes_out"`
	Ns       uint64 `json:"ns"`
	Keys     int    `json:"keys"`
}

func (s *sums) add(entries, in, out, ns uint64) {
	s.Entries += entries
	s.BytesIn += in
	s.BytesOut += out
	s.Ns += ns
}

type sink struct {
	mutex    sync.Mutex
	lengthMs int64
	newest   int64
	open     map[int64]map[key]*sums
	closed   sums
}

func (s *sink) close(before int64) {
	for window, rows := range s.open {
		if window >= before {
			continue
		}
		for _, one := range rows {
			s.closed.add(one.Entries, one.BytesIn, one.BytesOut, one.Ns)
		}
		if len(rows) > s.closed.Keys {
			s.closed.Keys = len(rows)
		}
		delete(s.open, window)
	}
}

func (s *sink) fold(common *data.AccessLogCommon, region string, in, out uint64) {
	start, duration := common.GetStartTime(), common.GetDuration()
	ns := duration.GetSeconds()*1_000_000_000 + int64(duration.GetNanos())
	endedMs := (start.GetSeconds()*1_000_000_000 + int64(start.GetNanos()) + ns) / 1_000_000
	window := endedMs - endedMs%s.lengthMs
	if window > s.newest {
		s.newest = window
		s.close(window - graceMs - s.lengthMs)
	}
	rows := s.open[window]
	if rows == nil {
		rows = map[key]*sums{}
		s.open[window] = rows
	}
	who := key{common.GetCustomTags()["project_name"], region, common.GetCustomTags()["gateway"], common.GetRouteName()}
	row := rows[who]
	if row == nil {
		row = &sums{}
		rows[who] = row
	}
	row.add(1, in, out, uint64(ns))
}

func (s *sink) stream(_ interface{}, stream grpc.ServerStream) error {
	region := ""
	for {
		message := &als.StreamAccessLogsMessage{}
		if err := stream.RecvMsg(message); err != nil {
			if err.Error() == "EOF" {
				return stream.SendMsg(&als.StreamAccessLogsResponse{})
			}
			return err
		}
		if who := message.GetIdentifier(); who != nil {
			region = who.GetNode().GetLocality().GetRegion()
		}
		s.mutex.Lock()
		for _, entry := range message.GetHttpLogs().GetLogEntry() {
			common := entry.GetCommonProperties()
			s.fold(common, region, common.GetDownstreamWireBytesReceived(), common.GetDownstreamWireBytesSent())
		}
		for _, entry := range message.GetTcpLogs().GetLogEntry() {
			connection := entry.GetConnectionProperties()
			s.fold(entry.GetCommonProperties(), region, connection.GetReceivedBytes(), connection.GetSentBytes())
		}
		s.mutex.Unlock()
	}
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: sink PORT WINDOW_MS")
		os.Exit(2)
	}
	lengthMs, err := strconv.ParseInt(os.Args[2], 10, 64)
	if err != nil {
		panic(err)
	}
	counted := &sink{lengthMs: lengthMs, open: map[int64]map[key]*sums{}}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "envoy.service.accesslog.v3.AccessLogService",
		HandlerType: (*interface{})(nil),
		Streams:     []grpc.StreamDesc{{StreamName: "StreamAccessLogs", Handler: counted.stream, ClientStreams: true}},
	}, counted)
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM)
	go func() {
		<-ends
		server.Stop()
	}()
	fmt.Println("ready")
	if err := server.Serve(listener); err != nil {
		panic(err)
	}
	counted.mutex.Lock()
	counted.close(math.MaxInt64)
	said, err := json.Marshal(counted.closed)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(said))
}
